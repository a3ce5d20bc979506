"""The two real-size spaces: they stand, are as large as they say, and hold nothing that falls off the kernels."""

from pathlib import Path

import pytest

from mixnas.kernels.gated_linear_attention import MAX_VALUE_CHANNELS
from mixnas.kernels.neighborhood_attention import MAX_HEAD_CHANNELS
from mixnas.search_space.enumeration import check_space
from mixnas.search_space.files import load_yaml
from mixnas.search_space.space import SearchSpace

_CONFIGS = Path(__file__).parents[2] / "configs"


def _space(name):
    return SearchSpace.from_dict(load_yaml(_CONFIGS / f"{name}.yaml")["space"])


def test_every_setting_that_gpu_measures_can_be_built(scripts):
    from _gpu_measured import SETTINGS

    for setting in SETTINGS:
        check_space(_space(setting.config), setting.io)
    assert {setting.batch for setting in SETTINGS if setting.config == "imagenet"} == {1, 32}
    assert {setting.io.size for setting in SETTINGS if setting.config == "lm"} == {(1024,), (8192,)}


def test_as_large_as_they_say():
    images = load_yaml(_CONFIGS / "imagenet.yaml")["space"]["stages"]
    widths = [width for stage in images for width in stage["width"]]
    assert (min(widths), max(widths), len(images)) == (48, 640, 4)
    assert max(depth for stage in images for depth in stage["depth"]) == 27
    (causal,) = load_yaml(_CONFIGS / "lm.yaml")["space"]["stages"]
    assert (min(causal["width"]), max(causal["width"])) == (256, 2048)
    for stage in [*images, causal]:
        assert set(stage["block"]["quant"]) == {"fp32", "bf16"}


@pytest.mark.parametrize("name", ["imagenet", "lm"])
def test_no_head_is_wider_than_its_kernel_takes(name):
    """A wider one would run ATen's form in pieces, and be measured as if that were the operator."""
    limits = {"gla": MAX_VALUE_CHANNELS, "neighborhood_attention": MAX_HEAD_CHANNELS}
    for stage in load_yaml(_CONFIGS / f"{name}.yaml")["space"]["stages"]:
        for mixer in stage["block"]["mixer"]:
            if isinstance(mixer, dict) and mixer["name"] in limits:
                heads = mixer["heads"] if isinstance(mixer["heads"], list) else [mixer["heads"]]
                assert max(stage["width"]) / min(heads) <= limits[mixer["name"]], mixer
