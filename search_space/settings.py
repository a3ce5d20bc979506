"""From plain data to frozen dataclasses, strictly, and back; durations; `--set key=value`.

Any dataclass will do: its field types say what is allowed and its defaults are the defaults. What does not fit is a
`ConfigError` that names the place, what was given, what is allowed and the nearest name.

Understood field types: int, float, str, bool, None in a union, Literal, `tuple[T, ...]`, `dict[str, T]`, Any (plain
data, taken as it is), other dataclasses, classes with `from_plain(plain, where)` and `to_plain()`, and `Annotated`
with `Between` or `Duration`. A dataclass may have `MOVED`: what is to be said of a key that it had once.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mixnas.search_space.errors import ConfigError, exactly, listed, nearest, shown, without_password
from mixnas.search_space.files import parse_yaml

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Between:
    """Bounds of a number, both included; None for none."""

    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        low = "" if self.low is None else f" from {exactly(self.low)}"
        return low + ("" if self.high is None else f" to {exactly(self.high)}")


class Duration:
    """Marks a float as a number of seconds that may be written as `90s`, `5m`, `1h30m`."""


LONGEST_DAYS = 3650

Seconds = Annotated[float, Duration]

_DURATION = re.compile(
    r"(?:(?P<d>\d+(?:\.\d+)?)d)?(?:(?P<h>\d+(?:\.\d+)?)h)?(?:(?P<m>\d+(?:\.\d+)?)m)?(?:(?P<s>\d+(?:\.\d+)?)s)?"
)


def parse_duration(value: Any, where: str = "duration") -> float:
    """Seconds from a number of seconds or text such as `90s`, `5m`, `1h30m`, `2d`; more than zero.

    Raises:
        ConfigError: Anything else.
    """
    seconds = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    elif isinstance(value, str) and value.strip():
        text = value.strip()
        match = _DURATION.fullmatch(text)
        if re.fullmatch(r"\d+(\.\d+)?", text):
            seconds = float(text)
        elif match:
            units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
            seconds = sum(float(match[unit]) * size for unit, size in units.items() if match[unit])
    if not 0 < seconds <= LONGEST_DAYS * 86400:
        raise ConfigError(
            f"{where}: {_given(value)} is not a duration. Allowed: 90s, 5m, 1h30m, or a number of seconds; up to "
            f"{LONGEST_DAYS}d."
        )
    return seconds


def _given(value: object) -> str:
    """A value as messages show it, in the words of the file that it stands in."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else shown(value)


class _Place:
    """Where in which source a value stands; a value set on the command line is traced to there."""

    def __init__(self, source: str, path: str = "", overridden: Mapping[str, str] | None = None) -> None:
        self.source, self.path, self.overridden = source, path, overridden or {}

    def __truediv__(self, key: str) -> _Place:
        return _Place(self.source, f"{self.path}.{key}" if self.path else key, self.overridden)

    def __str__(self) -> str:
        for key, text in self.overridden.items():
            if self.path == key or self.path.startswith(f"{key}."):
                return f"--set {text}: {self.path}"
        return f"{self.source}: {self.path}" if self.path else self.source


def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def build(cls: type[_T], plain: Any, source: str, *, overridden: Mapping[str, str] | None = None) -> _T:
    """An instance of a dataclass from plain data.

    Args:
        cls: A dataclass; see the module for the field types.
        plain: A mapping, as `load_yaml` gives.
        source: Name for messages, usually the file's path.
        overridden: Dotted paths that were set elsewhere (see `apply_overrides`), for messages.

    Raises:
        ConfigError: An unknown or missing key, a value of the wrong type or outside what is allowed.
    """
    return _build(cls, plain, _Place(source, "", overridden))


def _build(cls: type[_T], plain: Any, place: _Place) -> _T:
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    if not isinstance(plain, Mapping):
        raise ConfigError(f"{place}: expected a mapping with {listed(fields)}; got {_given(plain)}.")
    moved: Mapping[str, str] = getattr(cls, "MOVED", {})
    for key in plain:
        if key in moved:
            raise ConfigError(f"{place / str(key)}: {key} {moved[key]}.")
        if key not in fields:
            raise ConfigError(
                f"{place / str(key)[:60]}: unknown key {shown(key)}.{nearest(str(key), fields)} "
                + (f"Allowed: {listed(fields)}." if fields else "Allowed: none; it has no options.")
            )
    values: dict[str, Any] = {}
    hints = _hints(cls)
    for name, field in fields.items():
        if name in plain:
            values[name] = _convert(hints[name], plain[name], place / name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{place / name}: is missing, and has no default.")
    try:
        return cls(**values)
    except ConfigError as error:
        own = getattr(cls, "PLACE", place.path.rpartition(".")[2])  # what a class calls itself
        raise ConfigError(f"{place}: {str(error).removeprefix(f'{own}: ')}") from None


def _convert(hint: Any, value: Any, place: _Place) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        return _annotated(args[0], args[1:], value, place)
    if origin is Literal:
        if value not in args or type(value) not in {type(a) for a in args}:
            raise ConfigError(
                f"{place}: {_given(value)} is not allowed.{nearest(str(value), map(str, args))} "
                f"Allowed: {listed(args)}."
            )
        return value
    if origin in (Union, types.UnionType):
        return _union(args, value, place)
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{place}: expected a list; got {_given(value)}.")
        return tuple(_convert(args[0], item, place / str(i)) for i, item in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{place}: expected a mapping; got {_given(value)}.")
        return {key: _convert(args[1], item, place / key) for key, item in value.items()}
    if hasattr(hint, "from_plain"):
        return hint.from_plain(value, str(place))
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, place)  # type: ignore[arg-type]
    return _scalar(hint, value, place)


def _annotated(hint: Any, marks: Sequence[Any], value: Any, place: _Place) -> Any:
    if Duration in marks:
        return parse_duration(value, str(place))
    converted = _convert(hint, value, place)
    for mark in marks:
        if isinstance(mark, Between) and isinstance(converted, int | float):
            too_low = mark.low is not None and converted < mark.low
            if too_low or (mark.high is not None and converted > mark.high):
                raise ConfigError(f"{place}: {_given(value)} is not allowed. Allowed: {_word(hint)}{mark}.")
    return converted


def _union(args: tuple[Any, ...], value: Any, place: _Place) -> Any:
    if value is None and type(None) in args:
        return None
    errors = []
    options = [arg for arg in args if arg is not type(None)]
    for option in options:
        try:
            return _convert(option, value, place)
        except ConfigError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    raise ConfigError(f"{place}: {_given(value)} is not allowed. Allowed: {' or '.join(map(_word, options))}.")


def _word(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        return "a duration" if Duration in get_args(hint) else _word(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return ", ".join(map(str, get_args(hint)))
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return words.get(hint) or str(getattr(hint, "__name__", hint))


def _scalar(hint: Any, value: Any, place: _Place) -> Any:
    if hint is bool:
        fits = isinstance(value, bool)
    elif hint is int:
        whole = isinstance(value, float) and value.is_integer()  # 1e4 is a whole number too
        fits = (isinstance(value, int) and not isinstance(value, bool)) or whole
        value = int(value) if whole else value
    elif hint is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        value = float(value) if fits else value
    elif hint is str:
        fits = isinstance(value, str)
    else:
        raise TypeError(f"{place}: fields of type {hint!r} are not understood")
    if not fits:
        raise ConfigError(f"{place}: {_given(value)} is not allowed. Allowed: {_word(hint)}.")
    return value


def to_plain(value: Any) -> Any:
    """Plain data (mappings, lists, scalars) of a dataclass; `build` makes an equal one of it."""
    if hasattr(value, "to_plain"):
        return value.to_plain()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def one_or_more(texts: Iterable[str]) -> list[str]:
    """A list of texts; of one alone, that one and not its letters."""
    return [texts] if isinstance(texts, str) else list(texts)


_MARKS = "*&!%@`#"
"""With which no plain text of YAML begins (alias, anchor, tag, directive, comment): of a setting it is text."""

_NOT_QUOTED = ("storage",)
"""Keys whose settings no message has: what cannot be read as a URL may have a password anywhere."""


def apply_overrides(plain: Mapping[str, Any], settings: Iterable[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Apply `key=value` settings with dotted keys (`search.trials=20`, `space.stages.0.width=[16, 24]`).

    Args:
        plain: The configuration; it is not changed.
        settings: Each `key=value`; the value is YAML, or text where it begins with one of * & ! % @ ` # (`*.log`).

    Returns:
        The changed configuration, and the text of each setting by its dotted key, for messages.

    Raises:
        ConfigError: No `=`, an empty key, a value that is no YAML, or a key that leads into something else than a
            mapping or a list.
    """
    changed: dict[str, Any] = _copy(plain)
    overridden: dict[str, str] = {}
    for setting in one_or_more(settings):
        key, equals, text = setting.partition("=")
        key = key.strip()
        parts = key.split(".")
        setting = f"{key}=..." if equals and parts[0] in _NOT_QUOTED else without_password(setting)
        setting = setting if len(setting) <= 80 else f"{setting[:80]}..."
        if not equals or not all(parts):
            raise ConfigError(f"--set {setting}: expected key=value, for example search.trials=20.")
        if text.strip().startswith(tuple(_MARKS)):
            text = "'" + text.strip().replace("'", "''") + "'"
        value = parse_yaml(text, f"--set {setting}")
        node: Any = changed
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            node = _step(node, part, last, value, f"--set {setting}: {'.'.join(parts[: i + 1])}")
        overridden[key] = setting
    return changed, overridden


def _step(node: Any, part: str, last: bool, value: Any, where: str) -> Any:
    """Set `node[part]` when it is the last, else go down to it; mappings on the way are made."""
    if isinstance(node, list):
        if not part.isdigit() or int(part) >= len(node):
            raise ConfigError(f"{where}: {shown(part)} is not a place in a list of {len(node)}. Counting starts at 0.")
        index: Any = int(part)
    elif isinstance(node, dict):
        index = part
        if not last and node.get(part) is None:
            node[part] = {}
    else:
        raise ConfigError(f"{where}: leads into {shown(node)}, which is no mapping or list.")
    if last:
        node[index] = value
    return node[index]


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def load(
    cls: type[_T],
    plain: Any,
    source: str | Path,
    *,
    settings: Iterable[str] = (),
    resolve: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> _T:
    """`build` of plain data after `--set` settings.

    Args:
        cls: The dataclass.
        plain: A mapping, or None for an empty file.
        source: Name for messages.
        settings: `key=value` texts.
        resolve: Applied to the plain data before it is built (for example, to look a default up).
    """
    if plain is not None and not isinstance(plain, Mapping):
        raise ConfigError(f"{source}: expected a mapping at the top; got {_given(plain)}.")
    changed, overridden = apply_overrides(plain or {}, settings)
    if resolve is not None:
        changed = resolve(changed)
    return build(cls, changed, str(source), overridden=overridden)
