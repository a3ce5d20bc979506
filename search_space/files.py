"""Files: writes that are whole or not there at all, and the one strict YAML and JSON reader."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from mixnas.search_space.errors import ConfigError


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part.

    Temporary file in the same directory, fsync, rename, fsync of the directory.

    Args:
        path: Where to; missing parent directories are made.
        content: Text (written as UTF-8) or bytes.
    """
    data = content.encode() if isinstance(content, str) else content

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(data)

    atomic_create(path, write)


def atomic_create(path: str | Path, write: Callable[[Path], None]) -> None:
    """Like `atomic_write`, for content that a library writes itself: `write` is given a temporary path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        write(Path(name))
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes private files; a run is as readable as any other file
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented JSON, atomically. NaN and infinity are refused: they are not JSON."""
    atomic_write(path, json.dumps(obj, indent=2, allow_nan=False) + "\n")


def read_text(path: str | Path) -> str:
    """Read UTF-8 text; a `ConfigError` that names the file when it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}.") from error


class _StrictLoader(yaml.SafeLoader):
    """Safe, YAML 1.2 scalars (`1e-3` is a number, `no` a string, `010` ten), no aliases, no duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event: Any = self.peek_event()
            line = event.start_mark.line + 1
            raise ConfigError(f"{self.name}:{line}: alias *{event.anchor} is not allowed. Write the value out.")
        return super().compose_node(parent, index)


def _construct_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if key_node.tag == "tag:yaml.org,2002:merge":
            raise ConfigError(f"{loader.name}:{line}: merge key << is not allowed. Write the values out.")
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise ConfigError(f"{loader.name}:{line}: key {key!r} is not text. Put it in quotes.")
        if key in mapping:
            raise ConfigError(f"{loader.name}:{line}: key {key!r} stands twice in one mapping. Keep one of the two.")
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


def _construct_int(loader: _StrictLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node), 10)


_StrictLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)", "~nN\0"),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
     "-+0123456789."),
    ("merge", r"<<", "<"),
):  # fmt: skip
    _StrictLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), [c.replace("\0", "") for c in _first]
    )
_StrictLoader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse_yaml(text: str, source: str = "<text>") -> Any:
    """Parse YAML strictly into plain data.

    Args:
        text: One YAML document.
        source: Name used in messages, usually the path.

    Raises:
        ConfigError: Not YAML, a duplicate key, an alias, a merge key, a key that is not text, a custom tag.
    """
    loader = _StrictLoader(text)
    loader.name = source
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{where}: not valid YAML: {getattr(error, 'problem', None) or error}.") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{source}: a value cannot be read: {error}.") from error
    finally:
        loader.dispose()


def load_yaml(path: str | Path) -> Any:
    """`parse_yaml` of a file; JSON files are YAML too."""
    return parse_yaml(read_text(path), str(path))


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_str(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    # PyYAML reads these as line breaks or marks even between single quotes, and writes them there all the same.
    style = '"' if set(value) & set("\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    text = {float("inf"): ".inf", float("-inf"): "-.inf"}.get(value, ".nan" if value != value else repr(value))
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.yaml_implicit_resolvers = (
    _StrictLoader.yaml_implicit_resolvers
)  # so that it quotes what the reader needs quoted
_Dumper.add_representer(str, _represent_str)
_Dumper.add_representer(float, _represent_float)


def dump_yaml(obj: Any) -> str:
    """YAML text that `parse_yaml` reads back to an equal object; keys keep their order."""
    return yaml.dump(obj, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
