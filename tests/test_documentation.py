"""The code of the documentation runs, and does what the text says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

USE = {
    "extending.md": """
import tempfile
from pathlib import Path
import numpy as np
from mixnas.evaluators.tasks.checks import check_task
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.cost import cost
from mixnas.search_space.network import Network
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.supernet import Supernet
from mixnas.search.config import read_config
from mixnas.search.strategies import Question

io = IOSpec("image", (8, 8), 3, 4)
block = {"mixer": [{"name": "shift", "by": [1, 2]}, "identity"], "channel_mixer": "mlp", "quant": ["fp16", "fp32"]}
plain = {"stem": "conv", "stages": [{"width": [8, 16], "depth": [1, 2], "block": block}]}
space = SearchSpace.from_dict(plain)
supernet = Supernet(space, io, torch.Generator().manual_seed(0))
drawn = [space.sample(np.random.default_rng(seed)) for seed in range(12)]
assert any("shift" in str(a) for a in drawn) and any("fp16" in str(a) for a in drawn)
for architecture in drawn:
    network = supernet.extract(architecture).eval().deploy()
    stored = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    assert stored == cost(architecture, io).weight_bytes
    assert network(io.example(2)).shape == (2, 4)

check_task(Frequency(), "Frequency")

config = read_config({"search": {"strategy": {"name": "lightest", "pool": 32}}, "space": plain}, "text")
assert config.search.strategy == Lightest(pool=32)
def cheap(matrix):
    return {"params": np.array([cost(a, io).params for a in space.decode_many(matrix)])}
question = Question(space, config.parsed_objectives())
sampler = config.search.strategy.make(question, cheap, lambda a: True)
found = sampler.propose(None, 3, np.random.default_rng(0))
mean = np.mean([cost(space.sample(np.random.default_rng(s)), io).params for s in range(50)])
assert len(found) == 3 and max(cost(a, io).params for a in found) < mean

block = {"mixer": "shift", "channel_mixer": "mlp"}
fp32 = Architecture.from_dict({"stem": "conv", "stages": [{"width": 8, "block": block}]})
network = Network(fp32, io).eval().deploy()
as_json = formats.get("as-json")
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / as_json.file_name
    as_json.write(network, path, {})
    formats.verify(as_json, path, network, io.example(4))
    assert as_json.weight_bytes(path) == cost(fp32, io).weight_bytes
print("ran")
""",
}


@pytest.mark.parametrize("name", USE)
def test_the_examples_of_a_page_run(name, tmp_path):
    text = (ROOT / "docs" / name).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    assert blocks
    script = tmp_path / "example.py"  # a file: classes are looked up in their source
    script.write_text("\n\n".join([*blocks, USE[name]]))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip().endswith("ran"), done.stderr
