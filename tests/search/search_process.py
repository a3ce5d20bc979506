"""A small search in a process of its own, for the tests that kill it. Not a test module.

Started once, it imports everything and then forks a child for each line on stdin, so that a test may kill many
searches without paying for their imports. A line is JSON: {"journal", "trials", "seconds" (of an evaluation),
"strategy" (as in a configuration), "reported" (a file that gets a line per reported trial)}. It answers with the
child's process id, and with its wait status when it has ended.
"""

from __future__ import annotations

import json
import os
import sys
import time

from mixnas.search.engines.local import LocalEngine
from mixnas.search.engines.session import Budget
from mixnas.search.run.stopping import StopSignal
from mixnas.search.strategies import STRATEGIES
from mixnas.search.study.objectives import parse_constraints, parse_objectives
from mixnas.search.study.study import SearchStudy
from mixnas.search_space.errors import NasError
from mixnas.search_space.space import SearchSpace
from tests.contracts.engine import carry_out
from tests.search.problems import SPACE, FromFunction, analytic


def search(space, journal, trials, seconds, strategy, reported):
    log = os.open(reported, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def evaluator(architecture):
        time.sleep(seconds)
        if int(architecture.id, 16) % 7 == 0:
            raise ValueError("every seventh architecture or so fails")
        return analytic(architecture)

    def on_trial(record):
        os.write(log, f"{record.number} {record.id} {record.status}\n".encode())

    objectives = parse_objectives({"accuracy": "max", "latency_ms": "min", "params": "min"})
    constraints = parse_constraints(["params <= 1e4"])
    options = {"strategy": STRATEGIES.read(strategy, "strategy"), "seed": 11}
    try:
        with StopSignal() as stop, SearchStudy(journal, space, objectives, constraints, **options) as study:
            os.write(log, b"started\n")
            budget = Budget(trials=trials)
            carry_out(LocalEngine(), study, FromFunction(evaluator), budget, stop=stop, on_trial=on_trial)
    except NasError as error:
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    return 0


def main():
    space = SearchSpace.from_dict(SPACE)
    for line in sys.stdin:
        arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 99
            try:
                status = search(space, **arguments)
            finally:
                os._exit(status)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main()
