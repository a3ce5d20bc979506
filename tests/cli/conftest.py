from __future__ import annotations

from pathlib import Path

import pytest

from .command import CONFIG, nas


@pytest.fixture(scope="session")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `config.yaml`, one finished search of it (`runs/first`), and what it printed (`printed`)."""
    root = tmp_path_factory.mktemp("nas")
    (root / "config.yaml").write_text(CONFIG)
    result = nas("search", "-c", root / "config.yaml", "--name", "first", "--runs", root / "runs")
    assert result.returncode == 0, result.stderr
    (root / "printed").write_text(result.stdout)
    assert "search: 6/6 trials" in result.stderr and "measure" in result.stderr
    return root
