"""What holds for all tests."""

from __future__ import annotations

import signal

from hypothesis import settings

from tests.postgres import postgres as postgres  # a fixture

settings.register_profile("mixnas", deadline=None)  # how long a machine takes is no property of the code
settings.load_profile("mixnas")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a job in the background; tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Files with tests of many seconds first: at the end of a run on several cores none waits for one of them."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
