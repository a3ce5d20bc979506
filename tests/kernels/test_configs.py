import pytest
import torch

from mixnas.kernels import configs

_KERNELS = [(kernel, gpu) for kernel, by_gpu in configs.kernels().items() for gpu in by_gpu]


@pytest.mark.parametrize(("kernel", "gpu"), _KERNELS)
def test_every_shape_has_a_row(kernel, gpu):
    rows = configs.rows(kernel, gpu)
    assert rows[-1].up_to == {}, "the last row takes every shape"
    assert all(row.up_to for row in rows[:-1]), "rows behind an unbounded one are never reached"
    for row in rows:
        assert row.launch.get("num_stages", 1) >= 1
        powers = [size for name, size in row.launch.items() if name not in ("num_stages", "STAGES", "maxnreg")]
        assert all(size > 0 and size & (size - 1) == 0 for size in powers)


@pytest.mark.parametrize("kernel", configs.kernels())
def test_every_kernel_has_rows_for_any_gpu_and_the_interpreter(kernel):
    assert {configs.ANY_GPU, configs.INTERPRETER} <= set(configs.gpus(kernel))


@pytest.mark.parametrize("family", configs.load())
def test_every_table_says_where_it_comes_from(family):
    assert configs.load()[family]["provenance"]["source"]


def test_the_first_row_that_holds_the_shape_is_picked():
    x = torch.zeros(1)
    narrow = configs.pick("depthwise_forward", x, taps_down=1, taps_across=4, channels=8)
    assert narrow == configs.rows("depthwise_forward", configs.INTERPRETER)[0].launch
    assert configs.pick("depthwise_forward", x, taps_down=3, taps_across=3, channels=8) != narrow


def test_rows_without_wgmma_are_taken_where_asked_for(monkeypatch):
    kernel = "neighborhood_attention_forward"
    monkeypatch.setenv("MIXNAS_NO_WGMMA", "1")
    assert configs.rows(kernel, "nvidia-h200") == configs.rows(kernel, configs.NO_WGMMA)
    assert configs.rows(kernel, configs.INTERPRETER) == configs.kernels()[kernel][configs.INTERPRETER]
    assert configs.rows("glu_forward", "nvidia-h200") == configs.kernels()["glu_forward"][configs.ANY_GPU]
    monkeypatch.delenv("MIXNAS_NO_WGMMA")
    assert configs.rows(kernel, "nvidia-h200") == configs.kernels()[kernel][configs.ANY_GPU]


def test_an_unknown_kernel_names_the_known():
    with pytest.raises(KeyError, match="depthwise_forward"):
        configs.pick("convolution", torch.zeros(1))
