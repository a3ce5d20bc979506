"""The linear probe."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import nn

from mixnas.evaluators.supernet import probe
from mixnas.evaluators.supernet.judging import SubnetJudge
from mixnas.evaluators.supernet.probe import ends_linearly, fitted
from mixnas.evaluators.tasks.digits import Digits
from tests.evaluators.supernet.tiny import assert_equal, tiny_supernet, weights


def test_a_probe_is_the_logistic_regression_on_the_features(monkeypatch):
    """Against scikit-learn's, where the inherited last layer is zero, so that staying close to it is shrinkage."""
    stay = 1e-4
    for name, value in (("_STEPS", 500), ("_STAY", stay)):
        monkeypatch.setattr(probe, name, value)
    digits = Digits(label_smoothing=0.0)
    supernet = tiny_supernet(digits)
    *body, (_, head) = supernet.subnet(supernet.largest()).eval().units()
    head.linear.weight.data.zero_()
    before = weights(supernet)
    probed = SubnetJudge(supernet, digits, probe=10**6)(supernet.largest())  # as many as there are
    assert_equal(before, weights(supernet))
    features = []
    with torch.no_grad():
        for x in (digits.train.inputs, digits.validation.inputs):
            for _, module in body:
                x = module(x)
            features.append(head.features(x).numpy())
    oracle = LogisticRegression(C=1 / (2 * stay * len(digits.train)), max_iter=5000)
    oracle.fit(features[0], digits.train.targets.numpy())
    expected = log_loss(digits.validation.targets.numpy(), oracle.predict_proba(features[1]))
    assert probed["loss"] == pytest.approx(expected, rel=5e-3)
    plain = SubnetJudge(supernet, digits)(supernet.largest())
    assert probed["loss"] < 0.8 * plain["loss"] and probed["accuracy"] > 2 * plain["accuracy"]


@pytest.mark.parametrize("bias", [True, False])
def test_a_fitted_layer_answers_the_examples_and_leaves_the_given_one(bias):
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(3, 2, bias=bias)
    before = [p.clone() for p in linear.parameters()]
    x = torch.randn(40, 3, generator=generator)
    y = torch.stack([x[:, 0] - x[:, 1], x[:, 2]], 1)
    fit = fitted(linear, x.split(17), y, nn.functional.mse_loss)
    assert nn.functional.mse_loss(fit(x), y) < 0.05 * nn.functional.mse_loss(linear(x), y)
    assert all(torch.equal(p, q) for p, q in zip(linear.parameters(), before, strict=True))


def test_which_heads_can_be_probed():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

    whole = tiny_supernet(Digits())
    _, head = whole.subnet(whole.smallest()).units()[-1]
    assert ends_linearly(head)
    assert not ends_linearly(Half()) and not ends_linearly(nn.Linear(2, 2))
