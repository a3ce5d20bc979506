"""Pages that benchmarks write say of their times what is so; what prints a table alone has a help."""

import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_of_kernels_names_no_times_that_it_does_not_have():
    from mixnas.kernels.tools import report

    page = (DOCS / "kernels.md").read_text(encoding="utf-8")
    measured = any(report._measured(report.RESULTS))
    assert ("\n## Measured on " in page) == ("What was timed is at the end." in page) == measured
    assert ("Nothing on this page is timed." in page) != measured


def test_the_page_of_operators_says_of_which_runs_its_times_are():
    import operators

    try:
        (told,) = operators._two_runs()
    finally:
        for name in ("operators", "kernel_floors"):
            sys.modules.pop(name, None)
    page = (DOCS / "operators.md").read_text(encoding="utf-8")
    assert told in page.partition("\n## ")[0]
    assert "one thread of cpu-" in page and "this machine" not in page.partition("\n## ")[0]
    assert "Stems, downsamplings and heads are not among" in told


@pytest.mark.parametrize("name", ["kernel_floors", "operator_oracles"])
def test_help_is_help(name, scripts):
    done = subprocess.run([sys.executable, scripts / f"{name}.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {name}.py"), done.stderr
    assert "| ---" not in done.stdout
