"""`torch-export` with this package's Triton kernels kept, for those who have the package where the file is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mixnas.kernels import dispatch
from mixnas.search_space.formats.format import Answer, register
from mixnas.search_space.formats.torch_export import TorchExport
from mixnas.search_space.network import Network

if TYPE_CHECKING:
    import numpy as np


def load_torch_export_kernels(path: str | Path) -> Answer:
    """A file of `nas export --keep-kernels`: arrays to arrays. Needs mixnas, whose kernels it calls, and a GPU."""
    import torch
    from torch.export.passes import move_to_device_pass

    import mixnas.search_space.registry as registry

    registry.load()  # with the operators come their kernels
    device = "cuda" if torch.cuda.is_available() else "cpu"
    program = torch.export.load(path)
    module = (program if device == "cpu" else move_to_device_pass(program, device)).module()

    def answer(batch: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(batch).to(device)).cpu().numpy()

    return answer


@register
class TorchExportKernels(TorchExport):
    """The same program, with calls of `mixnas::` operations where a GPU would run a kernel."""

    name = "torch-export-kernels"
    file_name = "model-kernels.pt2"
    loads_with = ("torch", "triton", "mixnas")
    needs_mixnas = True
    backend = "triton"
    load = staticmethod(load_torch_export_kernels)

    def why_not(self, network: Network) -> str:
        """Not where its kernels cannot run: nobody could compare it."""
        if torch.cuda.is_available() or dispatch.INTERPRETING:
            return ""
        return "its Triton kernels run on CUDA devices alone, and torch sees none; torch-export has their ATen form"
