"""A search on Ray in a process of its own, for the tests that kill it. Not a test module.

python -m tests.search.engines.ray_process JOURNAL BEGUN TRIALS SECONDS
"""

from __future__ import annotations

import sys
from pathlib import Path

from mixnas.search.engines.ray import RayEngine
from mixnas.search.engines.session import Budget
from mixnas.search.run.stopping import StopSignal
from mixnas.search_space.errors import NasError
from tests.contracts.engine import carry_out, study_at
from tests.search.engines.troubles import Troubled


def main() -> int:
    journal, begun, trials, seconds = sys.argv[1:]
    evaluator = Troubled(Path(begun), seconds=float(seconds))
    try:
        with StopSignal() as stop, study_at(Path(journal)) as study:
            carry_out(RayEngine(workers=2, store_mb=80), study, evaluator, Budget(trials=int(trials)), stop=stop)
    except NasError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
