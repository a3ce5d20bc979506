"""A latency as plain data."""

import json

from mixnas.predictors.measuring.value import Latency


def test_plain_is_inverse():
    for latency in (Latency(1.0, 0.9, 1.1, "measured"), Latency(2.0, 1.0, 4.0, "predicted", ("width 64", "input"))):
        assert Latency.from_plain(json.loads(json.dumps(latency.to_plain()))) == latency
