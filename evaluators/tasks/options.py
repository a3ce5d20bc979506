"""Options that several tasks have: each is checked here, before any data is read."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from mixnas.search_space.errors import ConfigError

_Class = TypeVar("_Class", bound=type)

LARGEST = 1 << 31
"""Of a whole number that an option names no bound of."""


def check_whole(where: str, *, low: int = 1, high: int = LARGEST, **values: object) -> None:
    """Refuse what is no whole number from `low` to `high`.

    Args:
        where: The task, for messages.
        low, high: Bounds of all.
        **values: By the option's name.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"{where}: {name} is {value!r}, it must be a whole number from {low} to {high:,}.")


def check_share(where: str, *, low: float = 0.0, **values: object) -> None:
    """Refuse what is no share from `low` to below 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < 1:
            raise ConfigError(f"{where}: {name} is {value!r}, it must be a share from {low:g} to below 1.")


def check_shares(where: str, validation: float, test: float, seed: int) -> None:
    """Refuse shares and a seed that cannot be."""
    for name, value in (("validation", validation), ("test", test)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise ConfigError(f"{where}: {name} is {value!r}, it must be a share between 0 and 1.")
    if validation + test >= 1:
        raise ConfigError(
            f"{where}: validation and test are {validation + test:g} together; some must be left to train."
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 32:
        raise ConfigError(f"{where}: seed is {seed!r}, it must be a whole number from 0.")


def check_flags(where: str, **flags: object) -> None:
    """Refuse a switch that is neither true nor false."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{where}: {name} is {value!r}. Allowed: true, false.")


def check_memory(where: str, memory_gib: object) -> None:
    """Refuse what is no amount of memory.

    Raises:
        ConfigError: It is no number from 0.
    """
    if isinstance(memory_gib, bool) or not isinstance(memory_gib, int | float) or not memory_gib >= 0:
        raise ConfigError(f"{where}: memory_gib is {memory_gib!r}, it must be a number from 0.")


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureOptions:
    """What every classification of pictures may be told.

    Attributes:
        validation, test: Shares that are cut from the training pictures, each class alike, where the data has no such
            split.
        seed: Of that.
        weighted: Whether a class counts the more in training the rarer it is.
        flip: Whether training pictures are mirrored left to right.
        crop: Whether they are shifted, by up to an eighth of their extent.
        jitter: How far brightness and contrast are changed: by a factor from 1 - `jitter` to 1 + `jitter`.
        randaugment: How many operations of RandAugment each training picture goes through; 0 for none.
        magnitude: Of those, from 0 to 30.
        erase: Share of the training pictures in which a rectangle is erased.
        mixup: Number of the Beta distribution by which two pictures are mixed; 0 for none.
        cutmix: Likewise of those that get a rectangle of another.
        label_smoothing: See `Task`.
    """

    validation: float = 0.2
    test: float = 0.2
    seed: int = 0
    weighted: bool = False
    flip: bool = True
    crop: bool = True
    jitter: float = 0.0
    randaugment: int = 0
    magnitude: float = 9.0
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.1

    def check(self, where: str) -> None:
        """Refuse what cannot be."""
        check_shares(where, self.validation, self.test, self.seed)
        check_flags(where, weighted=self.weighted, flip=self.flip, crop=self.crop)
        check_share(where, jitter=self.jitter, label_smoothing=self.label_smoothing)
        check_whole(where, low=0, high=16, randaugment=self.randaugment)
        for name, high in (("magnitude", 30.0), ("erase", 1.0), ("mixup", 10.0), ("cutmix", 10.0)):
            value: object = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
                raise ConfigError(f"{where}: {name} is {value!r}, it must be a number from 0 to {high:g}.")


def takes_picture_options(*, without: tuple[str, ...] = (), **defaults: Any) -> Callable[[_Class], _Class]:
    """For a class whose `__init__` has an argument `options`: it takes the fields of `PictureOptions` in its place.

    Args:
        without: Fields that the class has no use for.
        **defaults: Of the class, where they are others.
    """

    def changed(cls: _Class) -> _Class:
        inner: Callable[..., None] = cls.__init__  # type: ignore[misc]
        own = [p for p in inspect.signature(inner).parameters.values() if p.name != "options"]
        shared = {f.name: f for f in fields(PictureOptions) if f.name not in without}
        values = asdict(PictureOptions()) | defaults

        def init(self: Any, **given: Any) -> None:
            told = {name: given.pop(name) for name in shared if name in given}
            inner(self, options=PictureOptions(**(values | told)), **given)

        init.__doc__ = inner.__doc__
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=values[name], annotation=field.type)
            for name, field in shared.items()
        ]
        init.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        cls.__init__ = init  # type: ignore[misc]
        return cls

    return changed
