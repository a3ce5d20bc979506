"""Makes `import mixnas` work from a checkout that is not installed: on a lent GPU machine there is only the folder."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def use_checkout() -> None:
    """Register this checkout's root as the package `mixnas`, unless that is importable already."""
    if importlib.util.find_spec("mixnas") is not None:
        return
    spec = importlib.util.spec_from_file_location(
        "mixnas", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mixnas"] = module
    spec.loader.exec_module(module)
