"""What a configuration chooses by name, with options: a task, a strategy, an engine."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from mixnas.search_space.errors import ConfigError, listed, nearest, shown
from mixnas.search_space.extensions import HINT, import_extensions
from mixnas.search_space.schema import Schema, schema_of
from mixnas.search_space.settings import build

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Named:
    """Something chosen by name, with its options: `digits`, or `{name: digits, seed: 1}`."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_plain(cls, plain: Any, where: str) -> Named:
        """Read the short or the long form."""
        if isinstance(plain, str):
            return cls(plain)
        if not isinstance(plain, Mapping) or not isinstance(plain.get("name"), str):
            raise ConfigError(f"{where}: expected a name or {{name: ..., option: value}}; got {shown(plain)}.")
        return cls(plain["name"], {key: value for key, value in plain.items() if key != "name"})

    def to_plain(self) -> str | dict[str, Any]:
        """The shorter form that says it all."""
        return {"name": self.name, **self.options} if self.options else self.name

    @classmethod
    def schema(cls) -> Schema:
        """What is read, as a JSON Schema: its options are whoever's it names, beside those of every task."""
        teacher: Schema = {"anyOf": [{"type": "string"}, {"type": "object", "required": ["file"]}]}
        of_all: Schema = {"teacher": teacher, "init": {"type": "string"}, "at_most": {"type": "integer", "minimum": 1}}
        named = {"type": "object", "properties": {"name": {"type": "string"}, **of_all}, "required": ["name"]}
        return {"anyOf": [{"type": "string"}, named]}


class Registry(Generic[_T]):
    """Frozen dataclasses by name; the fields of each are its options.

    Args:
        kind: What they are, in messages ("strategy").
        package: The package whose modules register them, one file each; it is imported when a name is first asked for.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind, self._package = kind, package
        self._classes: dict[str, type[_T]] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[type[_T]], type[_T]]:
        """Decorator that registers a frozen dataclass; a name that is taken is a `ValueError`."""

        def decorate(cls: type[_T]) -> type[_T]:
            if name in self._classes:
                raise ValueError(f"{self.kind} {name!r} is registered already")
            self._classes[name] = cls
            return cls

        return decorate

    def forget(self, name: str) -> None:
        """Undo `register`."""
        del self._classes[name]

    def __iter__(self) -> Iterator[str]:
        """The names, in the order of the alphabet."""
        if not self._loaded:
            self._loaded = True
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__, f"{self._package}."):
                importlib.import_module(module.name)
        import_extensions()
        return iter(sorted(self._classes))

    def read(self, plain: Any, where: str) -> _T:
        """What `name`, or `{name: ..., option: value}`, stands for.

        Raises:
            ConfigError: No such name, or an option that it does not have or allow.
        """
        named = Named.from_plain(plain, where)
        names = list(self)
        if named.name not in names:
            raise ConfigError(
                f"{where}: no {self.kind} is called {shown(named.name)}.{nearest(named.name, names)} "
                f"Allowed: {listed(names)}.{HINT}"
            )
        return build(self._classes[named.name], named.options, where)

    def schema(self) -> Schema:
        """What `read` takes, as a JSON Schema."""
        forms: list[Schema] = [{"enum": list(self)}]
        for name in self:
            options = schema_of(self._classes[name])
            options["properties"] = {"name": {"const": name}, **options["properties"]}
            forms.append({**options, "required": ["name", *options.get("required", [])]})
        return {"anyOf": forms}

    def name_of(self, chosen: _T) -> str:
        """The name under which its class is registered."""
        return next(name for name, cls in self._classes.items() if type(chosen) is cls)

    def to_plain(self, chosen: _T) -> str | dict[str, Any]:
        """What `read` makes it from, every option written out."""
        options = {f.name: getattr(chosen, f.name) for f in dataclasses.fields(chosen)}  # type: ignore[arg-type]
        return Named(self.name_of(chosen), options).to_plain()
