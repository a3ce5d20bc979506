"""The wheel: what is in it, and that it works without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the tracked files alone, elsewhere, so that nothing generated gets in or is left behind."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in listed.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        target,
        source,
    ]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = target.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_with_its_data_and_nothing_else(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"mixnas/nas.py", "mixnas/configs/digits.yaml", "mixnas/search_space/operators/mixers/attention.py"} <= set(
        names
    )
    for folder, pattern in (("kernels", "*.json"), ("configs", "*.yaml"), ("predictors/tables", "*.*")):
        for path in (ROOT / folder).glob(pattern):
            assert f"mixnas/{folder}/{path.name}" in names
    tops = {name.split("/")[0] for name in names}
    assert len(tops) == 2 and "mixnas" in tops
    assert not [name for name in names if name.startswith(("mixnas/tests", "mixnas/benchmarks", "mixnas/runs"))]


def test_every_folder_with_code_is_in_the_package_list():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    for package in ("kernels", "search_space", "predictors", "evaluators", "search", "cli"):
        for path in (ROOT / package).rglob("__init__.py"):
            assert ".".join(["mixnas", *path.parent.relative_to(ROOT).parts]) in listed


def test_the_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-m", "mixnas.nas", "space", "size"]
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert int(answer.stdout) > 10**12
    where = [sys.executable, "-c", "import mixnas.search.job as job; print(job.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).is_relative_to(tmp_path)


def test_a_checkout_that_is_not_installed_works_too(tmp_path: Path):
    """`python nas.py`, with the installed package hidden."""
    code = (
        "import sys, runpy; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]; "
        f"sys.argv = ['nas.py', '--version']; sys.path.insert(0, {str(ROOT)!r}); "
        f"runpy.run_path({str(ROOT / 'nas.py')!r}, run_name='__main__')"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert answer.stdout.strip() == "0.1.0", answer.stderr
