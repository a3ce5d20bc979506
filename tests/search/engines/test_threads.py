"""An engine of threads: several proposals in flight at any time, outcomes in any order."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import pytest

from mixnas.search.engines import ENGINES, Engine
from mixnas.search.study.study import Proposal
from tests.contracts.engine import EngineContract


@dataclass(frozen=True, kw_only=True, slots=True)
class Threads(Engine):
    workers: int = 3

    def run(self, session, evaluator):
        running: dict[Future, Proposal] = {}
        with ThreadPoolExecutor(self.workers) as pool:
            while True:
                for proposal in session.next(self.workers - len(running)):
                    running[pool.submit(evaluator.evaluate, [proposal.request])] = proposal
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    session.done(running.pop(future), *future.result())


class TestThreads(EngineContract):
    @pytest.fixture
    def engine(self):
        return Threads()


@pytest.fixture
def registered():
    ENGINES.register("threads")(Threads)
    yield
    ENGINES.forget("threads")


def test_an_engine_is_chosen_by_name_with_its_options(registered):
    from mixnas.search.config import read_config

    config = read_config({"search": {"engine": {"name": "threads", "workers": 2}}}, "test")
    assert config.search.engine == Threads(workers=2)
    assert config.to_plain()["search"]["engine"] == {"name": "threads", "workers": 2}
