"""Options that several tasks have: each is checked here, before any data is read."""

from __future__ import annotations

from mixnas.search_space.errors import ConfigError

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
