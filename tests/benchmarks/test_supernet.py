"""The super-network's benchmark: what was computed is written, also where a summary has nothing to say."""

from __future__ import annotations

import argparse
import json
import math
import warnings

import numpy as np


def test_what_json_cannot_say_becomes_null(scripts, tmp_path, monkeypatch):
    import supernet

    monkeypatch.setattr(supernet, "RESULTS", tmp_path)
    record = {"share": math.nan, "trainings": [{"tau": 0.5, "interval": (0.1, math.inf)}], "n": 3, "ok": True}
    supernet.write("try", 1, record)
    kept = json.loads((tmp_path / "supernet-try.json").read_text())
    assert kept["provenance"]["threads"] == 1
    del kept["provenance"]
    assert kept == {"share": None, "trainings": [{"tau": 0.5, "interval": [0.1, None]}], "n": 3, "ok": True}


def test_fidelity_of_one_super_network_and_one_seed_is_written(scripts, tmp_path, monkeypatch):
    """`fidelity --supernets 1 --seeds 1` worked for minutes and then lost everything to a mean of nothing."""
    import supernet
    import supernet_fidelity

    def trained(path, architectures, seeds, *_):  # instead of training each architecture by itself
        rng = np.random.default_rng(0)
        return {a.id: [{"loss": rng.random(), "score": rng.random(), "seconds": 1.0}] * seeds for a in architectures}

    monkeypatch.setattr(supernet_fidelity, "truth", trained)
    monkeypatch.setattr(supernet_fidelity, "_RESAMPLES", 20)
    monkeypatch.setattr(supernet, "RESULTS", tmp_path)
    args = argparse.Namespace(
        architectures=4, sample_seed=1, seeds=1, supernets=1, workers=1, out="one", threads=1,
        set=["supernet.seconds=null", "supernet.steps=2", "supernet.probe=0"],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        supernet.fidelity(args)
    kept = json.loads((tmp_path / "supernet-one.json").read_text())
    assert kept["ceiling"] == {"tau_between_seeds": None, "tau_of_one_with_mean_of_others": None}
    assert kept["inherited"]["share_of_ceiling"] is None
    assert len(kept["inherited"]["trainings"][0]["inherited_loss"]) == 4
