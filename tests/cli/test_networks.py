"""`nas export`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .command import nas, ok


def test_export_loads_with_this_package_alone(searched: Path, tmp_path: Path):
    runs = ("--runs", searched / "runs")
    folder = Path(ok("export", "first", "-o", tmp_path, *runs).strip())
    card = json.loads((folder / "card.json").read_text())
    assert card["verified"]["test_accuracy"] == pytest.approx(card["metrics"]["test_accuracy"])
    assert (
        "output (1, 10)" in subprocess.run([sys.executable, folder / "load.py"], capture_output=True, text=True).stdout
    )
    from mixnas.search_space.formats.safetensors import load_network

    assert load_network(folder / "model.safetensors")(torch.zeros(2, 8, 8, 1)).shape == (2, 10)
    damaged = folder / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    again = subprocess.run([sys.executable, folder / "load.py"], capture_output=True, text=True)
    assert again.returncode != 0 and "damaged" in again.stderr
    assert nas("export", "first", "--pick", "zzz", *runs).returncode == 2
