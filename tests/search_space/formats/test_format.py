from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mixnas.search_space.errors import IntegrityError, NasError
from mixnas.search_space.formats import format as formats

FOLDER = Path(formats.__file__).parent


def test_names_import_nothing_heavy():
    code = (
        "import sys; from mixnas.search_space.formats import format as f; assert 'onnx' in f.names(); "
        "heavy = {'torch', 'onnx', 'numpy'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_each_file_of_the_folder_is_the_format_that_its_name_says():
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", *formats.TOOLS}
    assert {name.replace("-", "_") for name in formats.names()} == files
    assert all(formats.get(name).name == name for name in formats.names())


def test_a_name_can_be_taken_once():
    class Taken:
        name = "safetensors"

    formats.get("safetensors")
    with pytest.raises(NasError, match="'safetensors' is registered twice"):
        formats.register(Taken)


class Twice(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


@pytest.mark.parametrize(("dtype", "off", "wrong"), [
    (torch.float32, 1e-5, False), (torch.float32, 1e-3, True),
    (torch.bfloat16, 1e-3, False), (torch.bfloat16, 1e-1, True),
])  # fmt: skip
def test_what_may_differ_depends_on_the_type_that_is_stored(dtype, off, wrong):
    network = Twice(dtype)
    x = torch.linspace(-50, 50, 12).view(3, 4)

    def answer(batch):
        return 2 * batch * (1 + off)

    if wrong:
        with pytest.raises(
            IntegrityError, match=rf"^the file: .* by up to {100 * off:.3g}, .*\(the outputs reach 100;"
        ):
            formats.compare(answer, network, x, "the file")
    else:
        agreement = formats.compare(answer, network, x, "the file")
        assert agreement.inputs == 3 and agreement.difference == pytest.approx(100 * off, rel=0.05)


def test_a_fixed_batch_size_is_noticed():
    def answer(batch):
        if len(batch) != 3:
            raise RuntimeError("3 expected\nand a long trace")
        return 2 * batch

    with pytest.raises(IntegrityError, match=r"fails on 1 input: RuntimeError: 3 expected$"):
        formats.compare(answer, Twice(), torch.ones(3, 4), "the file")
