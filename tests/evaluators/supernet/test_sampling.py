"""Which sub-networks a step trains."""

from collections import Counter

import pytest

from mixnas.evaluators.supernet.sampling import FairSampler
from mixnas.search_space.space import SearchSpace
from tests.evaluators.supernet.tiny import tiny_space


def test_every_operator_is_dealt_equally_often_at_every_place():
    sampler = FairSampler(tiny_space(), seed=0)
    drawn = [architecture for _ in range(60) for architecture in sampler.step(2)]
    for b in range(2):
        blocks = [architecture.stages[0].blocks[b] for architecture in drawn if len(architecture.stages[0].blocks) > b]
        for counts in (Counter(block.mixer.name for block in blocks), Counter(block.gate.name for block in blocks)):
            assert max(counts.values()) - min(counts.values()) <= 1
    assert len({architecture.id for architecture in drawn}) > 100


def test_a_sandwich_has_the_extremes_of_every_size():
    largest, smallest, middle = FairSampler(tiny_space(), seed=3).step(1)
    for architecture, width, depth, expansion in ((largest, 8, 2, 2.0), (smallest, 4, 1, 1.0)):
        (stage,) = architecture.stages
        assert (stage.width, len(stage.blocks)) == (width, depth)
        assert {block.channel_mixer.get("expansion") for block in stage.blocks} == {expansion}
    assert tiny_space().contains(middle)
    assert [len(FairSampler(tiny_space(), seed=3).step(2, corners)) for corners in ("both", "largest", "none")] == [
        4,
        3,
        2,
    ]


@pytest.mark.parametrize(("omissions", "left_out"), [(1, 20), (4, 40)])
def test_the_second_half_of_a_block_is_left_out_as_often_as_asked(omissions, left_out):
    block = {"mixer": "identity", "channel_mixer": ["none", {"name": "mlp", "expansion": 2}, "swiglu"]}
    stage = {"width": 8, "depth": 1, "block": block}
    space = SearchSpace.from_dict({"stem": {"name": "conv", "stride": 2}, "stages": [stage]})
    sampler = FairSampler(space, seed=0, omissions=omissions)
    drawn = Counter(sampler.draw().stages[0].blocks[0].channel_mixer.name for _ in range(60))
    rest = (60 - left_out) // 2
    assert drawn == {"none": left_out, "mlp": rest, "swiglu": rest}


def test_a_restored_sampler_goes_on_where_it_was():
    first, second = FairSampler(tiny_space(), seed=1), FairSampler(tiny_space(), seed=1)
    for _ in range(7):
        first.step(2)
    second.restore(first.state())
    assert [first.step(2) for _ in range(9)] == [second.step(2) for _ in range(9)]
