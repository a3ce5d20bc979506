"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("mixnas", deadline=None)  # how long a machine takes is no property of the code
settings.load_profile("mixnas")
