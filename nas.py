"""The command line's door, `nas`: in a checkout that is not installed, `python nas.py` is the same."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if __name__ == "__main__" and not __package__ and importlib.util.find_spec("mixnas") is None:
    # This folder is the package.
    _root = Path(__file__).resolve().parent
    _spec = importlib.util.spec_from_file_location(
        "mixnas", _root / "__init__.py", submodule_search_locations=[str(_root)]
    )
    assert _spec is not None and _spec.loader is not None
    sys.modules["mixnas"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["mixnas"])

from mixnas.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
