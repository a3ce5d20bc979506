from __future__ import annotations

import json

from mixnas.cli import doctor
from mixnas.cli.doctor import Finding

from .command import ok


def test_doctor_finds_what_is_here(monkeypatch):
    findings = {finding["what"]: finding for finding in json.loads(ok("doctor", "--json"))}
    assert findings["torch"]["ok"] and findings["Python"]["ok"]
    assert findings["Ray here"]["found"].startswith("starts in ") and findings["Ray here"]["ok"]
    assert findings["energy"]["ok"] or "energy_mj" in findings["energy"]["advice"]
    monkeypatch.setattr(doctor, "_ray", lambda: Finding("Ray here", "does not work: no"))  # it was tried above
    assert "scikit-learn" in ok("doctor") and "does not work" in ok("doctor")
