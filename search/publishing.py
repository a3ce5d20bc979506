"""Putting exported networks under their names: beside what an earlier export left there, and never over a user's work.

A folder holds one network. Files of other formats stay in it and in its card, as long as the network and its weights
are the same. What was changed since it was exported is never lost: where something else comes into its place, it stays
as `NAME.bak`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mixnas.search import card as cards
from mixnas.search.loader import loader
from mixnas.search_space.errors import ConfigError, NasError, listed, shown
from mixnas.search_space.files import (
    atomic_write,
    check_stamp,
    digest_of,
    parse_json,
    read_bytes,
    stamped,
    write_json,
)
from mixnas.search_space.formats import format as formats
from mixnas.search_space.network import Network

MAKING, BEFORE = ".exporting-", ".before"
"""How the folder begins in which networks are made before they have their names; how an earlier export in it ends."""
COPY = ".bak"
"""How the name ends under which a user's file stays whose place is taken."""

Told = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Exported:
    """A network whose files are written and verified, and lie in a folder that has not its final name yet.

    Attributes:
        made: That folder.
        network: As deployed.
        card: See `card.card`; what the folder holds already is not in it.
        data: What the run says of its data.
    """

    made: Path
    network: Network
    card: dict[str, Any]
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Earlier:
    """What an earlier export left in a folder.

    Attributes:
        card: Its card; empty where there is none, or it is not what was written.
        digests: SHA-256 of each file as it was written; empty where that is not known.
    """

    card: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> _Earlier:
        try:
            manifest = parse_json(read_bytes(folder / cards.MANIFEST), cards.MANIFEST)
            check_stamp(manifest, cards.MANIFEST)
            digests = {str(name): str(about["sha256"]) for name, about in manifest["files"].items()}
        except (NasError, ValueError, KeyError, TypeError, AttributeError):
            return cls()
        if not _is_as_written(folder / cards.CARD, digests):
            return cls({}, digests)
        card = parse_json(read_bytes(folder / cards.CARD), cards.CARD)
        return cls(card if isinstance(card, dict) else {}, digests)

    @property
    def files(self) -> Mapping[str, Mapping[str, Any]]:
        """What its card says of each network's file."""
        found = self.card.get("files")
        return found if isinstance(found, dict) else {}

    def kept(self, folder: Path, weights: str) -> dict[str, dict[str, Any]]:
        """Those of `files` that are there, if they hold the network with these weights.

        Raises:
            ConfigError: One is of a format that is not registered here, so that `load.py` could not load it any more.
        """
        if self.card.get("weights") != weights:
            return {}
        found = {name: dict(about) for name, about in self.files.items() if os.path.lexists(folder / name)}
        for name, about in found.items():
            if about.get("format") not in formats.names():
                raise ConfigError(
                    f"{folder / name}: is of format {shown(about.get('format'))}, which is not known here, so that "
                    "load.py could not load it any more. Name its module (--import), or export elsewhere (-o)."
                )
        return found


def digest_of_weights(network: Network) -> str:
    """SHA-256 of a network's tensors, by their names: whether two exports hold the same."""
    parts = []
    for name, tensor in sorted(network.state_dict().items()):
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {digest_of(content)}")
    return digest_of("\n".join(parts).encode())


def check_place(folder: Path, weights: str) -> None:
    """Refuse, before any work, a place into which a network could not be put.

    Raises:
        ConfigError: Something that is no folder of its own stands there, or see `_Earlier.kept`.
    """
    _check_folder(folder)
    _Earlier.of(folder).kept(folder, weights)


def publish(one: Exported, folder: Path, told: Told) -> Path:
    """Put an exported network under its name, beside what the folder holds already.

    Args:
        one: The network; its folder becomes `folder`.
        folder: Its final name.
        told: Told of every file that does not stay as it was.

    Raises:
        ConfigError: See `check_place`.
    """
    made = one.made
    with locked(folder.parent):  # one export at a time puts its folders into one place
        _check_folder(folder)
        before = _Earlier.of(folder)
        kept = before.kept(folder, one.card["weights"])
        _describe(one, before, kept)
        if folder.exists():
            for said in _carry_over(folder, made, before, kept):
                told(said)
            os.replace(folder, made.with_name(f"{made.name}{BEFORE}"))
        os.replace(made, folder)
    return folder


def _check_folder(folder: Path) -> None:
    if os.path.islink(folder) or (os.path.lexists(folder) and not folder.is_dir()):
        raise ConfigError(f"{folder}: is no folder of its own, so nothing is put into its place. Remove it.")


def _describe(one: Exported, before: _Earlier, kept: Mapping[str, dict[str, Any]]) -> None:
    """What stands beside the network's files; a new file comes into the place of an earlier one of its name."""
    made, network = one.made, one.network
    card: dict[str, Any] = {**one.card, "files": {**kept, **one.card["files"]}}
    if kept:
        card = {**{key: before.card[key] for key in ("verified", "data") if key in before.card}, **card}
        with_what = before.card.get("exported_with")
        for name in kept.keys() - one.card["files"].keys():
            if with_what is not None and with_what != card["exported_with"]:
                card["files"][name] = {"exported_with": with_what, **kept[name]}
    wanted = [formats.get(about["format"]) for about in card["files"].values()]
    atomic_write(made / cards.ARCHITECTURE, network.architecture.to_yaml())
    atomic_write(made / cards.LOADER, loader(wanted, network.io, one.data))
    write_json(made / cards.CARD, card)
    atomic_write(made / cards.README, cards.readme(card, network))
    contents: dict[str, dict[str, Any]] = {}
    for path in sorted(made.iterdir()):
        data = path.read_bytes()
        contents[path.name] = {"sha256": digest_of(data), "bytes": len(data)}
    for name in _names(kept):
        if name in before.digests and name not in contents:
            about: dict[str, Any] = {"sha256": before.digests[name]}
            contents[name] = about | {"bytes": kept[name]["bytes"]} if name in kept else about
    write_json(made / cards.MANIFEST, stamped({"format": cards.FORMAT, "files": dict(sorted(contents.items()))}))


def _names(kept: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of networks' files and of what stands beside them."""
    return [name for file, about in kept.items() for name in (file, *formats.get(str(about["format"])).beside)]


def _carry_over(folder: Path, made: Path, before: _Earlier, kept: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Copy into a new folder what stays of an earlier one; yields what is to be said of it."""
    stay, removed = {*_names(kept)}, []
    # What a card that is not as it was written says of the files is not known: then they are anybody's.
    unknown = [] if before.card else [name for name in before.digests if name not in cards.OWN]
    left = [name for name in unknown if os.path.lexists(folder / name) and not os.path.lexists(made / name)]
    for entry in sorted(folder.iterdir()):
        replaced = os.path.lexists(made / entry.name)
        if not replaced and (entry.name in stay or entry.name in unknown or entry.name not in before.digests):
            _copy(entry, made / entry.name)
        elif not (_is_as_written(entry, before.digests) or _same(entry, made / entry.name)):
            copy = _free(folder, made, entry.name)
            _copy(entry, made / copy)
            yield f"{folder / entry.name}: was not as it was exported; what it held is in {copy} now"
        elif not replaced:
            removed.append(entry.name)
    if removed:
        yield f"{folder}: removed {listed(removed)} of an earlier export, which held other weights; export them again"
    if left:
        yield f"{folder}: its card.json was changed, so {listed(left)} stay there, but no longer belong to the export"


def _is_as_written(entry: Path, digests: Mapping[str, str]) -> bool:
    """Whether a file is what was exported under its name."""
    if entry.is_symlink() or not entry.is_file():
        return False
    data = entry.read_bytes()
    if entry.name != cards.MANIFEST:
        return digest_of(data) == digests.get(entry.name)
    try:
        plain = parse_json(data, entry.name)
        check_stamp(plain, entry.name)
    except (NasError, TypeError):
        return False
    return bool(digests)


def _same(entry: Path, new: Path) -> bool:
    """Whether two files have the same content."""
    if entry.is_symlink() or not entry.is_file() or not new.is_file():
        return False
    return entry.read_bytes() == new.read_bytes()


def _copy(entry: Path, to: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.copytree(entry, to, symlinks=True)
    else:
        shutil.copy2(entry, to, follow_symlinks=False)


def _free(folder: Path, made: Path, name: str) -> str:
    """A name for a user's file whose own is taken."""
    number, found = 1, f"{name}{COPY}"
    while os.path.lexists(folder / found) or os.path.lexists(made / found):
        number += 1
        found = f"{name}{COPY}{number}"
    return found


# -- the folder that they are made in -------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a folder's lock, which ends with this process; gives whether it is held, at once where it does not wait."""
    try:
        place = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    held = True
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        yield held
    finally:
        os.close(place)


def clear_up(root: Path) -> None:
    """Remove what exports into a folder left that were killed; an earlier export that they had put aside comes back."""
    for left in root.glob(f"{MAKING}*"):
        with locked(left, wait=False) as dead, locked(root):
            if not dead:
                continue
            for before in left.glob(f"*{BEFORE}"):
                folder = root / before.name.removesuffix(BEFORE)
                if not os.path.lexists(folder):
                    os.replace(before, folder)
            shutil.rmtree(left, ignore_errors=True)
