"""Made-up devices, whose truth is known."""

from __future__ import annotations

import numpy as np

from mixnas.predictors.latency.features import Works
from mixnas.predictors.latency.lookup import SpaceUnits
from mixnas.predictors.measuring.measure import Window
from mixnas.predictors.measuring.table import MeasurementTable, subject
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec, plan

PLAIN = {
    "stem": {"name": "conv", "stride": 2},
    "stages": [
        {
            "width": [8, 16],
            "depth": [1, 2, 3],
            "block": {
                "mixer": ["identity", "pooling", {"name": "dwconv", "kernel_size": [3, 5]}],
                "channel_mixer": [{"name": "mlp", "expansion": [1, 2, 4]}, "swiglu"],
            },
        }
    ],
}
IO = IOSpec("image", (8, 8), 1, 10)


WORKS = Works()


def unit_ms(unit, pooling):
    """The truth about made-up devices: launches, arithmetic, and what pooling costs there."""
    work = WORKS.of(unit)
    calls = sum(value for name, value in work.items() if name.endswith(".calls"))
    macs = sum(value for name, value in work.items() if name.endswith(".macs"))
    slow = pooling if unit.role == "token" and unit.op("mixer").name == "pooling" else 1.0
    return (0.004 * calls + 2e-7 * macs) * slow


def device(directory, name, num_networks, rng, *, speed=1.0, pooling=1.0, share=1.0):
    """A table of a made-up device, with 1% of noise; `share` of the units are in it."""
    directory.mkdir(exist_ok=True)
    table = MeasurementTable.create_or_open(directory, name, "eager", 1, 0.2)
    provenance = table.add_provenance({"device": name})
    space = SearchSpace.from_dict(PLAIN)

    rows = []

    def add(what, latency):
        noisy = latency / speed * rng.lognormal(0, 0.01)
        rows.extend((what, Window(0, i, np.full(10, noisy * 1e6), 2e5, 2e5)) for i in range(3))

    truth = {unit: unit_ms(unit, pooling) for unit in SpaceUnits(space, IO).units}
    for unit, latency in truth.items():
        if rng.random() < share:
            add(subject("unit", unit.to_plain(), WORKS.of(unit), 1), latency)
    encoded = np.unique(space.sample_many(2 * num_networks, rng), axis=0)
    for vector in rng.permutation(encoded)[:num_networks]:
        architecture = space.decode(vector)
        total = sum(truth[unit] for _, unit in plan(architecture, IO))
        add(subject("network", {"architecture": architecture.to_dict(), "io": IO.to_plain()}, {}, 1), 1.1 * total)
    table.append(rows, provenance)
    return table
