"""Files: writes that are whole or not there at all, and the one strict YAML and JSON reader."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mixnas.search_space.errors import ConfigError, IntegrityError, shown, visible


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


def remove_unfinished(directory: Path) -> None:
    """Remove what writes that were killed have left in a directory; only for who alone writes there."""
    for path in directory.iterdir():
        if re.fullmatch(r"\..+\.[a-z0-9_]{8}", path.name) and stat.S_ISREG(path.lstat().st_mode):
            path.unlink(missing_ok=True)


def atomic_create(path: str | Path, write: Callable[[Path], None]) -> None:
    """Like `atomic_write`, for content that a library writes itself: `write` is given a temporary path."""
    path = Path(path)
    if path.exists() and not path.is_file():  # a rename would put a file in the place of a device
        raise ConfigError(f"{_short(path)}: cannot be written: it is no file, and nothing is put into its place.")
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
    except BaseException as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, name):
            error.filename = str(path)  # a full disk is nobody's: which file is it that lacks room?
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
    atomic_write(path, json_text(obj))


def json_text(obj: Any) -> str:
    """What `write_json` writes."""
    return json.dumps(obj, indent=2, allow_nan=False) + "\n"


_STAMP = "sha256"


def stamped(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data with a digest of itself as its last entry; see `check_stamp`."""
    rest = without_stamp(plain)
    return {**rest, _STAMP: digest_of(json.dumps(rest, sort_keys=True, allow_nan=False).encode())}


def without_stamp(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `stamped`."""
    return {key: value for key, value in plain.items() if key != _STAMP}


def check_stamp(plain: Mapping[str, Any], source: str) -> bool:
    """Whether plain data has a digest of itself, see `stamped`.

    Raises:
        IntegrityError: It has one, and it is another's.
    """
    if _STAMP not in plain:
        return False
    if stamped(plain)[_STAMP] != plain[_STAMP]:
        raise IntegrityError(f"{source}: damaged: not what was written. Restore it from a copy.")
    return True


def read_bytes(path: str | Path, *, at_most: int | None = None) -> bytes:
    """Read a file whole, if it is one: a pipe, on which a read might wait for ever, a device or a folder is none.

    A path under /dev (`/dev/stdin`, what a shell makes of `<(command)`) is whatever the user says.

    Args:
        path: The file.
        at_most: Bytes that it may have.

    Raises:
        ConfigError: It cannot be read, is no file, or is too long.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{_short(path)}: cannot be read: {reason}.") from error
    with contextlib.ExitStack() as held:
        held.callback(os.close, handle)
        kind = os.fstat(handle).st_mode
        if not stat.S_ISREG(kind) and not (str(path).startswith("/dev/") and not stat.S_ISDIR(kind)):
            what = "a folder" if stat.S_ISDIR(kind) else "a pipe, a socket or a device"
            raise ConfigError(f"{_short(path)}: cannot be read: it is {what}, not a file.")
        os.set_blocking(handle, True)
        try:
            with open(handle, "rb", closefd=False) as file:
                data = file.read() if at_most is None else file.read(at_most + 1)
        except OSError as error:
            raise ConfigError(f"{_short(path)}: cannot be read: {error.strerror}.") from error
    if at_most is not None and len(data) > at_most:
        raise ConfigError(f"{_short(path)}: is too long. Allowed: {at_most:,} bytes.")
    return data


def _short(path: str | Path) -> str:
    """A path as messages show it."""
    text = str(path)
    return text if len(text) <= 200 else f"{text[:60]}... ({len(text)} characters)"


def read_text(path: str | Path, *, at_most: int | None = None) -> str:
    """Read UTF-8 text; a `ConfigError` that names the file when it cannot be read. See `read_bytes`."""
    try:
        return read_bytes(path, at_most=at_most).decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{_short(path)}: cannot be read: not UTF-8 text.") from error


def digest_of(data: bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def parse_json(text: str | bytes, source: str) -> Any:
    """Parse JSON that this program wrote, strictly.

    Raises:
        IntegrityError: Not UTF-8, not JSON, NaN or infinity, or nested too deeply.
    """
    try:
        plain = _JSON.decode(text.decode("utf-8") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise IntegrityError(f"{source}: damaged: {reason[:120]}.") from error
    return plain


def read_json(path: str | Path) -> Any:
    """`parse_json` of a file.

    Raises:
        ConfigError: It cannot be read.
        IntegrityError: It is damaged.
    """
    return parse_json(read_bytes(path), str(path))


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse_constant)

LARGEST_YAML = 256 * 1024
"""Bytes of a YAML file: configurations, spaces and architectures, all written by hand or of that size."""
LONGEST_SCALAR = 1000
"""Characters of one value in it."""
MOST_VALUES = 20_000
"""Values that it stands for, each alias written out."""
LARGEST_INTEGER = 2**63 - 1
DEEPEST = 100
"""Lists and mappings in one another, where they are written with brackets."""

# What a terminal would obey. Line breaks and tabs are text.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")


class _StrictLoader(yaml.SafeLoader):
    """Safe, YAML 1.2 scalars (`1e-3` is a number, `no` a string, `010` ten), plain data only, no duplicate keys.

    An alias stands for what it is an alias of, within `MOST_VALUES` and not of itself.
    """

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level >= DEEPEST:
            raise RecursionError
        super().fetch_flow_collection_start(token)

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        self._count(node, {})
        return self.construct_document(node)

    def _count(self, node: Any, known: dict[int, int]) -> int:
        """Values that a node stands for; those of one under construction are none."""
        if id(node) in known:
            if known[id(node)] == 0:
                raise self.refused(node, "a value holds an alias of itself. Write it out")
            return known[id(node)]
        known[id(node)] = 0
        inside: list[Any] = []
        if isinstance(node, yaml.MappingNode):
            inside = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inside = node.value
        elif len(node.value) > LONGEST_SCALAR:
            raise self.refused(node, f"a value of {len(node.value):,} characters. Allowed: {LONGEST_SCALAR}")
        total = 1 + sum(self._count(part, known) for part in inside)
        if total > MOST_VALUES:
            raise self.refused(node, f"more than {MOST_VALUES:,} values, aliases written out")
        known[id(node)] = total
        return total

    def refused(self, node: Any, problem: str) -> ConfigError:
        """The error that says where."""
        return ConfigError(f"{self.name}:{node.start_mark.line + 1}: {problem}.")


def _construct_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if key_node.tag == "tag:yaml.org,2002:merge":
            raise ConfigError(f"{loader.name}:{line}: merge key << is not allowed. Write the values out.")
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise ConfigError(f"{loader.name}:{line}: key {shown(key)} is not text. Put it in quotes.")
        if key in mapping:
            raise ConfigError(
                f"{loader.name}:{line}: key {shown(key)} stands twice in one mapping. Keep one of the two."
            )
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


def _construct_int(loader: _StrictLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    value = int(text, 10) if len(text) <= 20 else LARGEST_INTEGER + 1
    if abs(value) > LARGEST_INTEGER:
        raise loader.refused(node, f"a whole number of {len(text)} digits. Allowed: up to {LARGEST_INTEGER}")
    return value


def _construct_bool(loader: _StrictLoader, node: yaml.ScalarNode) -> bool:
    text = loader.construct_scalar(node).lower()
    if text not in ("true", "false"):
        raise loader.refused(node, f"{shown(text)} is neither true nor false")
    return text == "true"


def _construct_float(loader: _StrictLoader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node)
    try:
        return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    except ValueError:
        raise loader.refused(node, f"{shown(text)} is no number") from None


def _refuse_tag(loader: _StrictLoader, node: yaml.Node) -> Any:
    raise loader.refused(node, f"tag {shown(node.tag)} is not allowed. Allowed: plain values, lists and mappings")


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
_StrictLoader.yaml_constructors = {
    "tag:yaml.org,2002:null": yaml.SafeLoader.yaml_constructors["tag:yaml.org,2002:null"],
    "tag:yaml.org,2002:str": yaml.SafeLoader.yaml_constructors["tag:yaml.org,2002:str"],
    "tag:yaml.org,2002:seq": lambda loader, node: loader.construct_sequence(node, deep=True),
    "tag:yaml.org,2002:bool": _construct_bool,
    "tag:yaml.org,2002:int": _construct_int,
    "tag:yaml.org,2002:float": _construct_float,
    "tag:yaml.org,2002:map": _construct_mapping,
    None: _refuse_tag,
}


def parse_yaml(text: str, source: str = "<text>") -> Any:
    """Parse YAML strictly into plain data.

    Args:
        text: One YAML document.
        source: Name used in messages, usually the path.

    Raises:
        ConfigError: Not YAML, a duplicate key, a merge key, a key that is not text, a tag of anything but plain data,
            or more than the bounds of this module allow.
    """
    source = _short(source)
    if len(text) > LARGEST_YAML:
        raise ConfigError(f"{source}: is too long. Allowed: {LARGEST_YAML:,} characters.")
    if (control := _CONTROL.search(text)) is not None:
        line = text.count("\n", 0, control.start()) + 1
        raise ConfigError(f"{source}:{line}: not valid YAML: control character {control[0]!r}. Take it out.")
    loader = None
    try:
        loader = _StrictLoader(text)
        loader.name = source
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
        raise ConfigError(f"{source}{where}: not valid YAML: {visible(problem)[:150]}.") from error
    except ConfigError:
        raise
    except RecursionError as error:
        raise ConfigError(f"{source}: cannot be read: nested too deeply.") from error
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ConfigError(f"{source}: a value cannot be read: {visible(str(error))[:150]}.") from error
    finally:
        if loader is not None:
            loader.dispose()


def load_yaml(path: str | Path) -> Any:
    """`parse_yaml` of a file; JSON files are YAML too."""
    return parse_yaml(read_text(path, at_most=LARGEST_YAML), str(path))


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
