"""What every file format keeps to. A test class inherits it and gives `name`."""

from __future__ import annotations

import functools
import inspect
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError, IntegrityError
from mixnas.search_space.formats import format as formats
from mixnas.search_space.formats.format import Format
from mixnas.search_space.network import IOSpec, Network
from mixnas.search_space.operators.norms import has_running_statistics, reset_running_statistics

from .cases import IOS, once

FEATURES = IOS["image"]
TOKENS = IOS["causal"]
"""Reads integers, answers densely."""
RAW = replace(FEATURES, mean=(127.5, 90.0, -3.25), std=(64.0, 0.5, 7.125))
"""Reads raw numbers, which the network itself brings to mean 0 and variance 1."""


def network_of(architecture: Architecture, io: IOSpec, seed: int = 0) -> Network:
    """Deployed, in evaluation mode, with norms and biases away from one and zero."""
    generator = torch.Generator().manual_seed(seed)
    network = Network(architecture, io, generator=generator).eval()
    with torch.no_grad():
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            if tensor.is_floating_point() and ("norm" in name or name.endswith("bias")):
                tensor.add_(0.2 * torch.rand(tensor.shape, generator=generator))
        if has_running_statistics(network):
            # Of one batch: with those of no data, products of many blocks would grow without bound.
            reset_running_statistics(network)
            network.train()(io.example(8, generator=generator))
            network.eval()
    return network.deploy()


def small(io: IOSpec, seed: int = 0) -> Network:
    """One block."""
    block = {"mixer": "attention", "gate": "output_sigmoid", "channel_mixer": "mlp"}
    stem = "embedding" if io.tokens else "conv"
    return network_of(Architecture.from_dict({"stem": stem, "stages": [{"width": 8, "block": block}]}), io, seed)


@functools.cache
def contents(name: str) -> dict[str, bytes]:
    """The files of `small(FEATURES)`, by name; written once, because that takes a second or more."""
    file_format = formats.get(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file_format.file_name
        file_format.write(small(FEATURES), path, {"note": "kept"})
        found = {entry.name: entry.read_bytes() for entry in path.parent.iterdir()}
        assert set(found) == {path.name, *file_format.beside}
        return found


def content(name: str) -> bytes:
    """The file itself."""
    return contents(name)[formats.get(name).file_name]


def lay(name: str, path: Path) -> None:
    """Put the files of `small(FEATURES)` there."""
    for entry, written in contents(name).items():
        path.with_name(entry).write_bytes(written)


def available(name: str) -> Format:
    """A format; the test is skipped where its packages are not installed."""
    found = formats.get(name)
    try:
        formats.require(found)
    except ConfigError as error:
        pytest.skip(str(error))
    return found


class FormatContract:
    """See the module.

    Attributes:
        name: The format.
        quants: Policies under which every operator is written.
    """

    name: str
    quants: Sequence[str] = ("fp32", "bf16")

    @pytest.fixture
    def file_format(self) -> Format:
        return available(self.name)

    @pytest.fixture
    def path(self, file_format: Format, tmp_path: Path) -> Path:
        return tmp_path / file_format.file_name

    def test_it_is_found_by_its_name(self):
        assert self.name in formats.names() and formats.get(self.name).name == self.name
        with pytest.raises(ConfigError, match=f"Did you mean '{self.name}'"):
            formats.get(self.name + "x")

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", IOS)
    def test_every_operator_comes_back_and_computes_the_same(self, file_format, path, kind):
        network = network_of(once(kind, self.quants), IOS[kind])
        assert file_format.why_not(network) == ""
        file_format.write(network, path, {})
        formats.verify(file_format, path, network, IOS[kind].example(3, generator=torch.Generator().manual_seed(0)))

    def test_files_load_where_they_say_and_answer_any_batch(self, file_format, path):
        """By the text that an export's `load.py` holds; where the format promises it, without this package. Features,
        tokens and raw numbers, in one process."""
        expected: dict[Path, np.ndarray] = {}
        for name, io in {"features": FEATURES, "tokens": TOKENS, "raw": RAW}.items():
            network, x, place = small(io), io.example(5), path.parent / name / path.name
            place.parent.mkdir()
            if io == FEATURES:
                lay(self.name, place)
            else:
                file_format.write(network, place, {})
            np.save(place.with_name("x.npy"), x.numpy())
            with torch.no_grad():
                expected[place.parent] = network(x).numpy()
        text = (
            "from __future__ import annotations\nimport sys\nimport numpy as np\n"
            + ("" if file_format.needs_mixnas else "sys.modules['mixnas'] = None\n")
            + inspect.getsource(file_format.load)
            + "for folder in sys.argv[1:]:\n"
            + f"    answer = {file_format.load.__name__}(f'{{folder}}/{path.name}')\n"
            + "    x = np.load(f'{folder}/x.npy')\n"
            + "    np.savez(f'{folder}/answers.npz', all=answer(x), one=answer(x[:1]))\n"
        )
        subprocess.run(
            [sys.executable, "-c", text, *map(str, expected)], check=True, cwd=path.parent, capture_output=True
        )
        for folder, outputs in expected.items():
            with np.load(folder / "answers.npz") as found:
                np.testing.assert_allclose(found["all"], outputs, rtol=1e-4, atol=1e-5)
                np.testing.assert_allclose(found["one"], outputs[:1], rtol=1e-4, atol=1e-5)

    def test_another_networks_file_is_noticed(self, file_format, path):
        lay(self.name, path)
        almost = small(FEATURES)
        name, parameter = list(almost.named_parameters())[-5]
        with torch.no_grad():
            parameter.view(-1)[0] += 1  # one weight
        unit = next(unit for unit, _ in almost.units() if name.startswith(unit))
        assert unit not in ("stem", "head")
        with pytest.raises(IntegrityError) as caught:
            formats.verify(file_format, path, almost, FEATURES.example(4))
        assert re.search(r"differ from the network's by up to [\d.e-]+, where [\d.e-]+ is", str(caught.value))
        if hasattr(file_format, "unit_outputs"):
            assert f"The first unit that differs is {unit}, by up to " in str(caught.value)
        wider = Network(almost.architecture, IOSpec("image", (4, 8), 3, 6)).eval()
        with pytest.raises(IntegrityError, match=r"answers \(4, 5\) to 4 inputs, and the network \(4, 6\)"):
            formats.verify(file_format, path, wider, FEATURES.example(4))

    def test_a_file_that_answers_nan_is_wrong(self, file_format, path):
        network = small(FEATURES)
        with torch.no_grad():
            next(network.parameters()).fill_(float("nan"))
        file_format.write(network, path, {})
        with pytest.raises(IntegrityError, match="by up to nan"):
            formats.verify(file_format, path, small(FEATURES), FEATURES.example(4))

    def test_no_and_unknown_files_are_refused_in_one_sentence(self, file_format, path):
        with pytest.raises(ConfigError, match="no such file"):
            formats.load(file_format, path)
        lay(self.name, path)
        whole = content(self.name)
        for damaged in (b"", b"not a network", whole[: len(whole) // 2]):
            path.write_bytes(damaged)
            with pytest.raises(IntegrityError) as caught:
                formats.load(file_format, path)
            assert str(path) in str(caught.value) and "damaged" in str(caught.value)
            assert len(str(caught.value).splitlines()) == 1

    def test_the_same_weights_are_the_same_bytes(self, file_format, path):
        file_format.write(small(FEATURES), path, {"note": "kept"})
        assert {entry.name: entry.read_bytes() for entry in path.parent.iterdir()} == contents(self.name)

    def test_it_says_nothing_of_this_machine(self, file_format):
        here = str(Path(formats.__file__).parents[2]).encode()
        assert not any(here in written for written in contents(self.name).values())

    def test_weights_are_counted_as_they_are_stored(self, file_format, path):
        lay(self.name, path)
        assert 0 < file_format.weight_bytes(path) < path.stat().st_size

    def test_what_it_needs_is_said(self, monkeypatch):
        file_format = formats.get(self.name)
        monkeypatch.setattr(type(file_format), "packages", ("a_package_that_is_not_there",))
        with pytest.raises(ConfigError, match="pip install a_package_that_is_not_there"):
            formats.require(file_format)
