"""The parts of `tasks.py` whose networks answer for each pixel: super-resolution and segmentation."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from _tasks_common import Beside, Clock, say, searched, told
from svg import Series, chart
from torch import Tensor, nn

from mixnas.evaluators.training import evaluate, train
from mixnas.search_space import registry
from mixnas.search_space.operators.layers import Standardise, WindowConv
from mixnas.search_space.registry import Context
from mixnas.search_space.units import IOSpec

ABOVE_DB, MEAN_IOU = 0.5, 0.9  # what is asked for


class Espcn(nn.Module):
    """ESPCN's published network of our parts: 5 x 5 to 64, 3 x 3 to 32, both tanh, 3 x 3 to scale^2, side by side.

    It has what a measurement asks a network for. Source: Shi et al. 2016, arXiv 1609.05158, section 3.3.1.
    """

    def __init__(self, io: IOSpec) -> None:
        super().__init__()
        self.io, self.architecture = io, SimpleNamespace(id="espcn")
        assert io.mean is not None and io.std is not None
        one, wide, narrow = (Context(width, io.size, "image") for width in (1, 64, 32))
        head = registry.get("head", "sub_pixel").build
        knobs = dict(io.head_op.knobs)
        self.standardise = Standardise(io.mean, io.std)
        self.first, self.second = WindowConv(one, 64, 5), WindowConv(wide, 32, 3)
        self.head = head(narrow, io.after(io.grid), **knobs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, p, p, 1) to (B, p * scale, p * scale, 1)."""
        return self.head(self.second(self.first(self.standardise(x)).tanh()).tanh())

    def deploy(self) -> Espcn:
        """Nothing is folded."""
        return self


def super_resolution(args: Any, clock: Clock) -> None:
    """A front of PSNR against latency on the test photograph, with ESPCN and bicubic interpolation."""
    with tempfile.TemporaryDirectory() as name:
        settings = clock.settings(
            "super_resolution", profile=0.12, supernet=0.35, search=0.18, final=0.18, changes=args.set
        )
        run, took = searched("super_resolution", Path(name), *settings)
        beside = Beside(run)
        torch.manual_seed(0)
        espcn = Espcn(beside.task.io)
        result = train(espcn, beside.task, beside.config.final.train, generator=torch.Generator().manual_seed(0))
        (latency,) = beside.latency.measure([espcn], passes=beside.config.latency.final_passes)
        reference = {
            "test_psnr": evaluate(espcn, beside.task, "test").score,
            "latency_ms": latency.ms,
            "params": sum(p.numel() for p in espcn.parameters()),
            "train_steps": result.steps,
            "train_seconds": result.seconds,
        }
        record = told(run, took)
        bicubic = beside.task.bicubic["test"]
        best = max(member["test_psnr"] for member in record["front"])
        say(f"bicubic {bicubic:.2f} dB, ESPCN {reference['test_psnr']:.2f} dB, the front's best {best:.2f} dB")
        clock.write(
            "super_resolution",
            {
                **record,
                "bicubic_test_psnr": bicubic,
                "espcn": reference,
                "best_test_psnr": best,
                "above_bicubic_db": best - bicubic,
                "above_by_as_much_as_asked": best - bicubic >= ABOVE_DB,
            },
        )
        points = sorted((m["latency_ms"], m["test_psnr"]) for m in record["front"])
        ends = [points[0][0], max(points[-1][0], reference["latency_ms"])]
        text = chart(
            [
                Series("bicubic interpolation", [(x, bicubic) for x in ends], line=True, marks=False),
                Series("the front", points, line=True),
                Series("ESPCN", [(reference["latency_ms"], reference["test_psnr"])]),
            ],
            title=f"Super-resolution x{beside.config.task.to_plain().get('scale', 3)}, the test photograph",
            x="latency (ms, CPU, one thread, one patch)",
            y="PSNR on luma (dB)",
        )
        (clock.results / "tasks-super_resolution.svg").write_text(text)


def segmentation(args: Any, clock: Clock) -> None:
    """A front of mean intersection over union against latency, on shapes that are drawn."""
    with tempfile.TemporaryDirectory() as name:
        settings = clock.settings("segmentation", profile=0.08, supernet=0.25, search=0.12, final=0.9, changes=args.set)
        run, took = searched("segmentation", Path(name), *settings)
        record = told(run, took)
        best = max(member["test_mean_iou"] for member in record["front"])
        say(f"best mean IoU on test: {best:.4f}")
        clock.write("segmentation", {**record, "best_test_mean_iou": best, "as_good_as_asked": best >= MEAN_IOU})
