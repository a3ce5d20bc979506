"""Training and judging real networks on real data."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mixnas.evaluators import batches
from mixnas.evaluators.tasks.digits import Digits
from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.task import IGNORE, Split, Task
from mixnas.evaluators.training import (
    DivergedError,
    TrainConfig,
    evaluate,
    judged,
    learning_rate,
    parameter_groups,
    recalibrate,
    train,
)
from mixnas.search.config import Config, load_config
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError, StoppedEarly
from mixnas.search_space.network import Network
from mixnas.search_space.operators.auxiliary import add_loss
from mixnas.search_space.reporting import SILENT
from mixnas.search_space.settings import build
from mixnas.search_space.units import IOSpec
from tests.evaluators.streamed import HalfFlipped, Signs

SMALL = {
    "stem": {"name": "conv", "stride": 2},
    "stages": [{"width": 16, "blocks": [{"mixer": {"name": "dwconv", "kernel_size": 3}, "channel_mixer": "mlp"}]}],
}


@pytest.fixture(scope="module")
def digits() -> Task:
    return by_name("digits")


def small_network(seed: int = 0) -> Network:
    io = by_name("digits").io
    return Network(Architecture.from_dict(SMALL), io, generator=torch.Generator().manual_seed(seed))


def train_small(task: Task, config: TrainConfig, *, seed: int = 0, network: nn.Module | None = None, **options):
    network = small_network() if network is None else network
    return network, train(network, task, config, generator=torch.Generator().manual_seed(seed), **options)


class Dropped(nn.Module):
    """Draws from the global generator in training, as dropout does; also has a norm with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10)
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_digits_are_learned(digits: Task) -> None:
    before = evaluate(small_network(), digits)
    network, result = train_small(digits, TrainConfig(epochs=8, lr=1.6e-2, augment=False))
    after = evaluate(network, digits)
    assert result.steps == result.planned_steps == 8 * (1078 // 64)
    assert before.score < 0.3 and after.score > 0.85
    assert after.loss < before.loss / 2
    assert not network.training


def test_recall_is_learned_by_attention_and_not_without_it() -> None:
    config = load_config(Path(__file__).parents[2] / "configs" / "mqar.yaml")
    task = by_name(config.task.name, **config.task.options, train_size=8000)
    training = config.train
    scores = {}
    for mixer in ("attention", "linear_attention"):
        blocks = [
            {"mixer": {"name": "dwconv", "kernel_size": 3}, "channel_mixer": "none"},
            {"mixer": {"name": mixer, "heads": 1}, "channel_mixer": "none"},
        ]
        plain = {"stem": "embedding", "stages": [{"width": 16, "blocks": blocks}]}
        network = Network(Architecture.from_dict(plain), task.io, generator=torch.Generator().manual_seed(0))
        _, result = train_small(task, training, network=network)
        scores[mixer] = evaluate(network, task, "test").score
        assert (result.validations[-1][1] >= training.stop_at) == (result.steps < training.steps)
        assert [step for step, _ in result.validations] == list(range(50, result.steps + 1, 50))
    assert scores["attention"] >= 0.95
    assert scores["linear_attention"] < 0.5


@pytest.mark.parametrize("make", [small_network, Dropped])
def test_same_seed_same_weights_and_global_generator_untouched(digits: Task, make) -> None:
    config = TrainConfig(steps=30, ema=0.9)
    state = torch.random.get_rng_state()
    runs = [train_small(digits, config, seed=seed, network=make()) for seed in (3, 3, 4)]
    assert torch.equal(torch.random.get_rng_state(), state)
    (first, a), (second, b), (other, _) = runs
    assert a.loss == b.loss
    for x, y in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(x, y)
    assert any(not torch.equal(x, y) for x, y in zip(first.parameters(), other.parameters(), strict=True))


def test_a_loss_that_is_not_finite_names_step_and_loss(digits: Task) -> None:
    class Poisoned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = small_network(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.inner(x) * (math.inf if self.calls == 7 else 1.0)

    with pytest.raises(DivergedError, match=r"loss is nan at step 7\. Lower lr") as caught:
        train_small(digits, TrainConfig(steps=20), network=Poisoned())
    assert caught.value.step == 7
    assert math.isnan(caught.value.loss)


def test_weights_that_are_not_finite_are_no_metric(digits: Task) -> None:
    network = small_network()
    with torch.no_grad():
        next(network.parameters()).fill_(math.nan)
    with pytest.raises(DivergedError, match="validation loss is nan"):
        evaluate(network, digits)


class Watch:
    """A report that keeps what it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float | None, dict[str, object]]] = []
        self.phase = SILENT.phase

    def __call__(self, done: float, total: float | None = None, **info: object) -> None:
        self.seen.append((done, total, info))


def test_should_stop_and_report(digits: Task) -> None:
    watch = Watch()
    with pytest.raises(StoppedEarly, match="after 5 of 34 steps"):
        train_small(
            digits,
            TrainConfig(steps=34),
            report=watch,
            should_stop=lambda: len(watch.seen) == 5,
        )
    assert [told[:2] for told in watch.seen] == [(step, 34) for step in range(1, 6)]
    assert all(set(info) == {"loss"} and math.isfinite(info["loss"]) for *_, info in watch.seen)


def test_what_report_raises_ends_the_training(digits: Task) -> None:
    class PrunedError(Exception):
        pass

    class Pruner(Watch):
        def __call__(self, done: float, total: float | None = None, **info: object) -> None:
            if "score" in info:
                raise PrunedError(f"{done}: {info['score']}")

    with pytest.raises(PrunedError, match=r"3: 0\.\d+"):
        train_small(digits, TrainConfig(steps=10, validate_every=3), report=Pruner())


def test_validation_at_the_last_step_is_not_made_twice(digits: Task) -> None:
    _, result = train_small(digits, TrainConfig(steps=6, validate_every=3))
    assert [step for step, _ in result.validations] == [3, 6]


def test_only_training_examples_are_seen_and_each_once_an_epoch() -> None:
    seen: list[Tensor] = []

    class Watched(Task):
        name = "watched"

        def augment(self, inputs: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            seen.append(inputs.clone())
            return inputs, targets

    task = Watched()
    digits = by_name("digits")
    task.io, task.train, task.validation, task.test = digits.io, digits.train, digits.validation, digits.test
    train_small(task, TrainConfig(epochs=2, batch_size=77))  # 14 batches of 77 are exactly 1078
    images = torch.cat(seen).flatten(1)
    assert len(images) == 2 * 1078
    for epoch in images.split(1078):
        assert torch.equal(torch.unique(epoch, dim=0), torch.unique(digits.train.inputs.flatten(1), dim=0))
    assert not torch.equal(images[:1078], images[1078:])


def test_fewer_examples_than_a_batch(digits: Task) -> None:
    class Few(Task):
        name = "few"

    task = Few()
    task.io, task.validation = digits.io, digits.validation
    task.train = Split(digits.train.inputs[:5], digits.train.targets[:5])
    _, result = train_small(task, TrainConfig(epochs=3, batch_size=64))
    assert result.steps == 3


@pytest.mark.parametrize("parts", [2, 3, 1000])
def test_a_batch_in_parts_is_the_same_step_with_less_in_memory(digits: Task, parts: int) -> None:
    """The gradient is the batch's, and no forward sees more than a part of it."""
    config = TrainConfig(steps=6, batch_size=30, augment=False)
    whole, seen = small_network(), []
    train_small(digits, config, network=whole)
    network = small_network()
    network.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])) if module.training else None)
    train_small(digits, config, network=network, parts=parts)
    assert max(seen) == max(1, 30 // parts) and sum(seen) == 6 * 30
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name], atol=2e-4, rtol=1e-3)


def test_moving_average_replaces_the_weights(digits: Task) -> None:
    plain, _ = train_small(digits, TrainConfig(steps=40, warmup=0.0))
    averaged, _ = train_small(digits, TrainConfig(steps=40, warmup=0.0, ema=0.95))
    start, end, mean = (nn.utils.parameters_to_vector(n.parameters()) for n in (small_network(), plain, averaged))
    moved = [(end - start).norm(), (mean - start).norm()]
    assert 0.2 * moved[0] < moved[1] < moved[0]  # on its way, behind the weights


def test_recalibrated_statistics_are_those_of_the_training_data(digits: Task) -> None:
    network = Dropped()
    norm = network.layers[2]
    with torch.no_grad():
        recalibrate(network, digits, generator=torch.Generator().manual_seed(0), batch_size=154, batches=7)
        hidden = network.layers[:2](digits.train.inputs)
    torch.testing.assert_close(norm.running_mean, hidden.mean(0), rtol=1e-4, atol=1e-5)
    assert norm.momentum == 0.1
    assert network.training  # as it was


def test_evaluation_does_not_depend_on_the_batch_size(digits: Task) -> None:
    network = small_network()
    whole, pieces = evaluate(network, digits, "test", batch_size=1000), evaluate(network, digits, "test", batch_size=7)
    assert whole.score == pytest.approx(pieces.score, abs=1e-9)
    assert whole.loss == pytest.approx(pieces.loss, rel=1e-5)


class Sparse(Task):
    """Dense targets, half of them unlabelled, and some examples without any label."""

    name = "sparse"

    def __init__(self, count: int = 7, void: tuple[int, ...] = (), size: tuple[int, int] = (4, 4)) -> None:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(count, *size, 2, generator=generator)
        targets = torch.randint(3, (count, *size), generator=generator)
        targets[torch.rand(targets.shape, generator=generator) < 0.5] = IGNORE
        targets[list(void)] = IGNORE
        self.train = self.validation = self.test = Split(inputs, targets)
        self.io = IOSpec("image", size, 2, 3, head="token")


def sparse_network(io: IOSpec, norm: str = "layer") -> Network:
    plain = {"stem": "linear", "norm": norm, "stages": [{"width": 4, "block": {"mixer": "identity"}}]}
    plain["stages"][0]["block"]["channel_mixer"] = "mlp"
    return Network(Architecture.from_dict(plain), io, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("void", [(), (6,), (2, 3, 4), (0, 1)])
def test_unlabelled_examples_count_nothing_whatever_the_batch_size(void: tuple[int, ...]) -> None:
    task = Sparse(void=void)
    network = sparse_network(task.io).eval()
    split = task.validation
    with torch.no_grad():
        outputs = network(split.inputs)
    labelled = split.targets != IGNORE
    right = (outputs.argmax(-1) == split.targets) & labelled
    shares = [right[i].sum() / labelled[i].sum() for i in range(len(split)) if labelled[i].any()]
    loss = torch.nn.functional.cross_entropy(outputs[labelled], split.targets[labelled]).item()
    for batch_size in (1, 2, 3, 7, 512):
        found = evaluate(network, task, batch_size=batch_size)
        assert found.score == pytest.approx(torch.stack(shares).mean().item(), abs=1e-6), batch_size
        assert found.loss == pytest.approx(loss, rel=1e-5), batch_size
        assert found.error is not None and math.isfinite(found.error)


def test_training_on_unlabelled_examples_leaves_finite_weights() -> None:
    network, result = train_small(Sparse(void=(3, 4)), TrainConfig(epochs=4, batch_size=1), network=sparse_network(
        Sparse().io))  # fmt: skip
    assert math.isfinite(result.loss) and all(bool(p.isfinite().all()) for p in network.parameters())


def test_a_split_without_any_label_is_not_judged() -> None:
    task = Sparse(void=tuple(range(7)))
    with pytest.raises(ConfigError, match="the validation has no labelled target"):
        evaluate(sparse_network(task.io), task)


@pytest.mark.parametrize("count", [2, 127, 128, 129, 257])
def test_recalibration_gives_a_batch_norm_more_than_one_value(count: int) -> None:
    task = Sparse(count, size=(1, 1))
    network = sparse_network(task.io, "batch")
    recalibrate(network, task, generator=torch.Generator().manual_seed(0))
    assert all(bool(buffer.isfinite().all()) for buffer in network.buffers())


def test_biases_and_norms_do_not_decay() -> None:
    network = small_network()
    decaying, free = parameter_groups(network, 0.3)
    names = {id(p): name for name, p in network.named_parameters()}
    assert decaying["weight_decay"] == 0.3 and free["weight_decay"] == 0.0
    assert all("norm" in names[id(p)] or "bias" in names[id(p)] for p in free["params"])
    assert not any("norm" in names[id(p)] or "bias" in names[id(p)] for p in decaying["params"])
    assert len(decaying["params"]) + len(free["params"]) == len(names)


def test_learning_rate_rises_then_falls_to_zero() -> None:
    rates = [learning_rate(step, 100, 1.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == max(rates) == 1.0
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    assert learning_rate(0, 100, 1.0, 0.0) == 1.0
    assert all(0 < learning_rate(step, 3, 1.0, 0.9) <= 1.0 for step in range(3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"lr": 0.0}, "lr is 0.0, it must be a number above 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"warmup": 1.0}, "warmup is 1.0"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"betas": (0.9,)}, "betas"),
        ({"augment": 1}, "true or false"),
        ({"batch_size": True}, "batch_size is True"),
    ],
)
def test_configuration_is_checked(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**options)


# -- what a task decides -----------------------------------------------------------------------------------------


def signs_network(task: Task) -> Network:
    """Of one pixel, it can tell the sign."""
    plain = {"stem": {"name": "conv", "kernel_size": 1, "stride": 1}, "stages": [{"width": 8, "blocks": [
        {"mixer": "identity", "channel_mixer": "mlp"}]}]}  # fmt: skip
    return Network(Architecture.from_dict(plain), task.io, generator=torch.Generator().manual_seed(0))


def signs_trained(task: Task, config: TrainConfig) -> tuple[Network, float]:
    network, result = train_small(task, config, network=signs_network(task))
    return network, result.loss


def test_a_streamed_dense_task_is_learned_and_targets_that_stay_behind_show() -> None:
    config = TrainConfig(epochs=16, batch_size=32, lr=2e-2)
    right, half = (signs_trained(task, config) for task in (Signs(), HalfFlipped()))
    task = Signs()
    assert evaluate(right[0], task).score > 0.95 > 0.7 > evaluate(signs_network(task), task).score
    # A quarter of the answers are wrong in the training of the other.
    assert right[1] < 0.35 and half[1] > 0.5


def test_a_stream_gives_the_weights_that_the_same_tensors_give(monkeypatch) -> None:
    monkeypatch.setattr(batches, "_GATHERED_VALUES", 3 * 32 * 30)  # an epoch of five batches in two parts
    streamed, held = Signs(), Signs()
    held.train = Split(*held.train.gather(torch.arange(len(held.train))))
    config = TrainConfig(epochs=3, batch_size=32, ema=0.9)
    (first, a), (second, b) = (signs_trained(task, config) for task in (streamed, held))
    assert a == b
    for x, y in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(x, y)


def test_a_metric_that_is_no_mean_of_batches_does_not_depend_on_them() -> None:
    task = Signs()
    network, _ = signs_trained(task, TrainConfig(steps=4, batch_size=32))
    whole, *pieces = (evaluate(network, task, batch_size=size) for size in (1000, 64, 7, 1))
    assert 0 < whole.score < 1
    assert [piece.score for piece in pieces] == [whole.score] * 3  # exactly
    assert all(piece.loss == pytest.approx(whole.loss, rel=1e-5) for piece in pieces)


def test_smoothing_is_in_the_training_loss_alone() -> None:
    config = TrainConfig(steps=30)
    (smooth, _), (honest, _) = (train_small(Digits(label_smoothing=s), config) for s in (0.1, 0.0))
    assert not torch.equal(next(smooth.parameters()), next(honest.parameters()))
    judged = [evaluate(smooth, Digits(label_smoothing=s)) for s in (0.1, 0.0)]
    assert judged[0] == judged[1]


def test_where_label_smoothing_went_is_said() -> None:
    with pytest.raises(ConfigError, match=r"train\.label_smoothing: label_smoothing is an option of the task now"):
        build(Config, {"train": {"label_smoothing": 0.1}}, "old.yaml")


class OwnLoss(Digits):
    """Counts what it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return outputs.square().mean()


def test_a_loss_of_ones_own_is_trained_on(digits: Task) -> None:
    task = OwnLoss()
    network, result = train_small(task, TrainConfig(steps=20, lr=2e-2))
    assert task.calls == 20
    x, _ = task.train.gather(torch.arange(50))
    assert network(x).square().mean() < 0.5 * small_network()(x).square().mean()
    assert result.loss < 1


class Adds(nn.Module):
    """Answers that nothing trained has a part in, and a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(10))

    def forward(self, x: Tensor) -> Tensor:
        add_loss(self.weight.square().sum())
        return x.flatten(1)[:, :10] + 0 * self.weight


def test_a_loss_that_an_operator_adds_is_minimised_too(digits: Task) -> None:
    network, result = train_small(digits, TrainConfig(steps=20, lr=5e-2), network=Adds())
    assert network.weight.abs().max() < 0.6
    assert result.loss > evaluate(network, digits).loss


class SwitchesOff(Digits):
    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        value = super().loss(outputs, targets, label_smoothing)
        torch.set_grad_enabled(False)
        return value


def test_gradients_that_a_loss_switches_off_are_on_again_for_others() -> None:
    with pytest.raises(RuntimeError):
        train_small(SwitchesOff(), TrainConfig(steps=3))
    assert torch.is_grad_enabled()
    evaluate(small_network(), SwitchesOff())
    assert torch.is_grad_enabled()


class NoScore(Digits):
    def score(self, outputs: Tensor, targets: Tensor) -> float:
        return math.nan


def test_a_metric_that_is_not_finite_is_named() -> None:
    with pytest.raises(DivergedError, match="the validation accuracy is nan"):
        evaluate(small_network(), NoScore())


class _Right(Task):
    """Judges outputs (n, 2), whatever they are of; `squared` is no mean over examples."""

    io = IOSpec("image", (8, 8), 1, 2)

    def __init__(self, squared: bool = False) -> None:
        self.squared = squared

    def new_metric(self):
        return super().new_metric() if not self.squared else _RootMeanSquare()


class _RootMeanSquare:
    def __init__(self) -> None:
        self.values: list[float] = []

    def update(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.values += (outputs[:, 0] - targets).square().tolist()

    def result(self) -> float:
        return math.sqrt(sum(self.values) / len(self.values))


def test_the_standard_error_of_an_accuracy_is_that_of_so_many_examples() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(1600, 2, generator=generator) + torch.tensor([1.0, 0.0])
    targets = torch.zeros(1600, dtype=torch.long)
    for parts in (1, 7):  # in whatever batches
        found = judged(_Right(), zip(outputs.chunk(parts), targets.chunk(parts), strict=True), "the validation")
        assert found.score == pytest.approx((outputs.argmax(-1) == 0).double().mean().item())
        wanted = math.sqrt(found.score * (1 - found.score) / 1600)
        assert found.error is not None and 0.6 < found.error / wanted < 1.6
    assert judged(_Right(), [(outputs[:1], targets[:1])], "one").error is None
    assert set(judged(_Right(), [(outputs[:1], targets[:1])], "one").named("accuracy")) == {"accuracy", "loss"}
    rms = judged(_Right(squared=True), [(outputs, targets)], "the validation")
    exact = (outputs[:, 0].square().var() / 1600).sqrt().item() / (2 * rms.score)  # the delta method
    assert rms.error is not None and 0.6 < rms.error / exact < 1.6


class _Share(Task):
    io = IOSpec("image", (8, 8), 1, 2)

    def __init__(self) -> None:
        pass


@pytest.mark.parametrize("right", [True, False])
def test_no_share_is_known_without_error(right: bool) -> None:
    """All right or none: half of Wilson's interval for one standard error is then 1 / 2 (n + 1)."""
    outputs = torch.tensor([[1.0, 0.0]]).expand(100, 2)
    targets = torch.full((100,), 0 if right else 1)
    found = judged(_Share(), [(outputs, targets)], "the validation")
    assert found.score == float(right) and found.error == pytest.approx(1 / 202)
    # Wilson 1927, for z = 1 and n = 100: from 1 / (1 + 1 / n) to 1
    assert pytest.approx(1 / (1 + 1 / 100)) == 1 - 2 * 1 / 202


def test_a_share_has_the_error_of_wilson_s_interval() -> None:
    """sqrt(p q / n + 1 / 4 n^2) / (1 + 1 / n), and so that of `p q / n` where there are many."""
    generator = torch.Generator().manual_seed(0)
    targets = (torch.rand(16_000, generator=generator) < 0.05).long()
    found = judged(_Share(), [(torch.tensor([[1.0, 0.0]]).expand(16_000, 2), targets)], "the validation")
    n, p = 16_000, found.score
    wilson = math.sqrt(p * (1 - p) / n + 1 / (4 * n * n)) / (1 + 1 / n)
    assert found.error is not None and 0.6 < found.error / wilson < 1.6


def test_a_metric_of_its_own_without_scatter_has_no_known_error() -> None:
    exact = judged(_Right(squared=True), [(torch.zeros(64, 2), torch.zeros(64).long())], "the validation")
    assert exact.score == 0 and exact.error is None
