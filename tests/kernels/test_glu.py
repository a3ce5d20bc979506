from typing import ClassVar

import pytest
import torch

from mixnas.kernels.glu import glu, glu_reference
from mixnas.kernels.testing import Case, KernelContract


def _case(shape, activation):
    return Case(tensors={"gate": shape, "up": shape}, options={"activation": activation})


class TestGlu(KernelContract):
    function = staticmethod(glu)
    reference = staticmethod(glu_reference)
    operator = "mixnas::glu"
    cases: ClassVar = {
        "silu": _case((2, 63, 31), "silu"),
        "sigmoid": _case((2, 7, 64), "sigmoid"),
        "one element": _case((1, 1), "silu"),
    }


def test_says_what_is_wrong():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="activation 'relu'"):
        glu(x, x, "relu")
    with pytest.raises(ValueError, match="same shape"):
        glu(x, x[:1])
