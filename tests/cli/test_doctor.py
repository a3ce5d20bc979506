from __future__ import annotations

import json

from .command import ok


def test_doctor_finds_what_is_here():
    findings = {finding["what"]: finding for finding in json.loads(ok("doctor", "--json"))}
    assert findings["torch"]["ok"] and findings["Python"]["ok"]
    assert "scikit-learn" in ok("doctor")
