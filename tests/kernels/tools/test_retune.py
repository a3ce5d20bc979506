import json

import pytest
import torch

from mixnas.kernels import configs
from mixnas.kernels.tools import retune


def test_candidates_start_from_the_row_and_stay_within_limits():
    row = configs.Row(launch={"BLOCK": 64, "ROWS": 2, "num_warps": 4, "num_stages": 1})
    found = list(retune.candidates(row))
    assert found[0] == row.launch
    assert len({tuple(launch.items()) for launch in found}) == len(found)
    assert {launch["ROWS"] for launch in found} == {1, 2}
    assert {launch["num_warps"] for launch in found} == {2, 4, 8}
    assert {launch["num_stages"] for launch in found} == {1, 2}


@pytest.mark.parametrize("family", configs.load())
def test_a_table_is_written_as_it_stands(family):
    text = (configs.TABLES / f"{family}.json").read_text(encoding="utf-8")
    assert json.loads(retune.format_table(json.loads(text))) == json.loads(text)


def test_an_override_is_scoped():
    x = torch.zeros(1)
    before = configs.pick("glu_forward", x)
    with configs.override("glu_forward", {"BLOCK": 16}):
        assert configs.pick("glu_forward", x) == {"BLOCK": 16}
    assert configs.pick("glu_forward", x) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_refuses_without_a_gpu(capsys):
    with pytest.raises(SystemExit):
        retune.main([])
    assert "needs a CUDA device" in capsys.readouterr().err
