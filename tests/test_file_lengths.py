"""No file is longer than a reader holds in mind."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONGEST = 600
LONGEST_DOOR = 60


def test_no_python_file_is_too_long():
    listed = subprocess.run(["git", "ls-files", "-z", "*.py"], cwd=ROOT, capture_output=True, check=True, text=True)
    paths = [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert len(paths) > 100 and ROOT / "nas.py" in paths
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    too_long = {name: length for name, length in lengths.items() if length > LONGEST}
    assert not too_long, f"over {LONGEST} lines: {too_long}"
    assert lengths["nas.py"] <= LONGEST_DOOR
