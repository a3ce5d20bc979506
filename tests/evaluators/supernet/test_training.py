"""Training one super-network: on real data, stopped and resumed, killed, refused."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mixnas.evaluators import batches
from mixnas.evaluators.supernet import training
from mixnas.evaluators.supernet.training import SupernetConfig, load_supernet, train_supernet, update
from mixnas.evaluators.tasks.digits import Digits
from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.task import Split, Task
from mixnas.evaluators.training import evaluate, parameter_groups
from mixnas.search_space.errors import ConfigError, IntegrityError, StoppedEarly
from mixnas.search_space.reporting import SILENT
from mixnas.search_space.supernet import Supernet
from tests.evaluators.streamed import Signs
from tests.evaluators.supernet.tiny import CONFIG, assert_equal, tiny_space, tiny_supernet, weights


@pytest.fixture(scope="module")
def digits() -> Task:
    return by_name("digits")


class Watch:
    """A report that keeps (step, steps, loss)."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float | None, object]] = []
        self.phase = SILENT.phase

    def __call__(self, done: float, total: float | None = None, **info: object) -> None:
        self.seen.append((done, total, info["loss"]))


def test_training_teaches_all_subnetworks(digits):
    supernet = tiny_supernet(digits)
    rng = np.random.default_rng(0)
    architectures = [supernet.space.sample(rng) for _ in range(6)]
    untrained = [evaluate(supernet.subnet(a), digits).loss for a in architectures]
    watch = Watch()
    config = dataclasses.replace(CONFIG, steps=300, lr=3e-2, distillation=0.5)
    result = train_supernet(supernet, digits, config, seed=0, report=watch)
    trained = [evaluate(supernet.subnet(a), digits) for a in architectures]
    assert all(after.loss < before for after, before in zip(trained, untrained, strict=True))
    assert max(metrics.score for metrics in trained) > 0.4
    assert (result.steps, result.subnets) == (300, 900)
    assert [(step, total) for step, total, _ in watch.seen] == [(i + 1, 300) for i in range(300)]
    assert result.loss == pytest.approx(np.mean([loss for _, _, loss in watch.seen[-33:]]))


def test_equal_seeds_give_equal_weights_whatever_the_global_generator_does(digits):
    results = []
    for seed in (0, 0, 1):
        supernet = tiny_supernet(digits)
        torch.default_generator.manual_seed(seed + len(results))
        before = torch.get_rng_state()
        train_supernet(supernet, digits, CONFIG, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        results.append(weights(supernet))
    assert_equal(results[0], results[1])
    assert not torch.equal(results[0]["head.output.pool.linear.weight"], results[2]["head.output.pool.linear.weight"])


def train_until(task: Task, norm: str, path: Path, last: int | None) -> tuple[Supernet, int]:
    """In a new store, from the checkpoint there is, to step `last` or the end; returns the steps done."""
    supernet, watch = tiny_supernet(task, norm), Watch()

    def done() -> int:
        return int(watch.seen[-1][0]) if watch.seen else 0

    def stop() -> bool:
        return last is not None and done() >= last - 1

    with contextlib.nullcontext() if last is None else pytest.raises(StoppedEarly):
        train_supernet(supernet, task, CONFIG, seed=0, checkpoint=path, report=watch, should_stop=stop)
    return supernet, done()


@pytest.mark.parametrize(("make", "norm"), [(Digits, "layer"), (Digits, "batch"), (Signs, "layer")])
def test_stopped_training_resumes_to_the_same_weights(make, norm, tmp_path, monkeypatch):
    """Stopped in the warm-up, in the middle of an epoch and before the last step, each time into a new store.

    The examples of the streamed task are computed, five batches an epoch in three parts, and augmented.
    """
    task = make()
    if make is Signs:
        monkeypatch.setattr(batches, "_GATHERED_VALUES", 2 * 32 * 30)
    whole = tiny_supernet(task, norm)
    result = train_supernet(whole, task, CONFIG, seed=0)
    path = tmp_path / "supernet.safetensors"
    for last in (1, 8, 19):
        _, done = train_until(task, norm, path, last)
        assert done == last
    resumed, done = train_until(task, norm, path, None)
    assert done == result.steps
    assert_equal(weights(whole), weights(resumed))
    again, done = train_until(task, norm, path, None)
    assert done == 0  # it was finished
    assert_equal(weights(whole), weights(again))


def test_a_resumed_training_gathers_only_what_it_goes_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "_GATHERED_VALUES", 2 * 32 * 30)
    path = tmp_path / "supernet.safetensors"
    train_until(Signs(), "layer", path, 13)  # in the second part of the third epoch
    task = Signs()
    train_supernet(tiny_supernet(task), task, CONFIG, seed=0, checkpoint=path)
    shape_probe, *asked = task.train.asked
    assert len(shape_probe) == 1
    assert [len(indices) for indices in asked] == [64, 32, 64, 64, 32]


def test_a_stream_gives_the_weights_that_the_same_tensors_give():
    streamed, held = Signs(), Signs()
    held.train = Split(*held.train.gather(torch.arange(len(held.train))))
    trained = []
    for task in (streamed, held):
        trained.append(tiny_supernet(task))
        train_supernet(trained[-1], task, CONFIG, seed=0)
    assert_equal(weights(trained[0]), weights(trained[1]))


_TRAIN = """
import sys, torch
torch.set_num_threads(1)
from tests.evaluators.supernet.tiny import CONFIG, tiny_supernet
from mixnas.evaluators.supernet.training import train_supernet
from mixnas.evaluators.tasks.loading import by_name
task = by_name("digits")
supernet = tiny_supernet(task)
train_supernet(supernet, task, CONFIG, seed=0, checkpoint=sys.argv[1], report=lambda s, *_, **__: print(s, flush=True))
"""


@pytest.mark.chaos
def test_killed_training_resumes_to_the_same_weights(digits, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = tiny_supernet(digits)
        train_supernet(whole, digits, CONFIG, seed=0)
    finally:
        torch.set_num_threads(threads)
    path = tmp_path / "supernet.safetensors"
    command = [sys.executable, "-c", _TRAIN, str(path)]
    for kill_at in (3, 11):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if int(line) >= kill_at:
                    time.sleep(0.003)  # into a step or a write
                    process.send_signal(signal.SIGKILL)
                    break
            assert process.wait() == -signal.SIGKILL
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    resumed = tiny_supernet(digits)
    load_supernet(resumed, path)
    assert_equal(weights(whole), weights(resumed))


def test_a_checkpoint_of_something_else_is_refused(digits, tmp_path):
    path = tmp_path / "supernet.safetensors"
    short = dataclasses.replace(CONFIG, steps=2)
    train_supernet(tiny_supernet(digits), digits, short, seed=0, checkpoint=path)
    with pytest.raises(ConfigError, match="another seed"):
        train_supernet(tiny_supernet(digits), digits, short, seed=1, checkpoint=path)
    with pytest.raises(ConfigError, match="another config"):
        train_supernet(tiny_supernet(digits), digits, CONFIG, seed=0, checkpoint=path)
    with pytest.raises(ConfigError, match="another space"):
        load_supernet(tiny_supernet(digits, norm="rms"), path)
    with pytest.raises(ConfigError, match="another task"):
        train_supernet(tiny_supernet(digits), Digits(label_smoothing=0.0), short, seed=0, checkpoint=path)
    judged_otherwise = dataclasses.replace(short, probe=64, checkpoint_every=60.0)  # the same training
    assert train_supernet(tiny_supernet(digits), digits, judged_otherwise, seed=0, checkpoint=path).steps == 2
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(IntegrityError):
        load_supernet(tiny_supernet(digits), path)


def test_a_checkpoint_of_an_earlier_version_is_refused(digits):
    path = Path(__file__).parents[2] / "data" / "v1" / "finished" / "supernet.safetensors"
    with pytest.raises(IntegrityError, match=r"its format is 'mixnas-supernet-1'; this needs 'mixnas-supernet-2'"):
        load_supernet(tiny_supernet(digits), path)


def test_a_time_budget_decides_the_steps_once(digits, tmp_path, monkeypatch):
    clocked(monkeypatch, Clock(0.1, 0.1, 0))
    path = tmp_path / "supernet.safetensors"
    config = dataclasses.replace(CONFIG, steps=None, seconds=1.5)
    untouched, supernet = weights(tiny_supernet(digits)), tiny_supernet(digits)
    watch = Watch()
    with pytest.raises(StoppedEarly):
        train_supernet(supernet, digits, config, seed=0, checkpoint=path, report=watch, should_stop=lambda: True)
    ((step, steps, _),) = watch.seen
    assert step == 1 and steps > 1
    # Measuring has trained nothing: as many steps asked for by number give the same weights.
    resumed = tiny_supernet(digits)
    result = train_supernet(resumed, digits, config, seed=0, checkpoint=path)
    assert result.steps == steps
    by_number = tiny_supernet(digits)
    train_supernet(by_number, digits, dataclasses.replace(CONFIG, steps=steps), seed=0)
    assert_equal(weights(resumed), weights(by_number))
    last = "head.output.pool.linear.weight"
    assert not torch.equal(weights(resumed)[last], untouched[last])


@pytest.mark.parametrize(
    "wrong",
    [
        {"samples": -1},
        {"distillation": 2.0},
        {"seconds": 0.0},
        {"stop_at": 0.9},
        {"lr": 0},
        {"corners": "all"},
        {"omissions": 0},
        {"probe": -1},
        {"distillation": 0.5, "corners": "none"},
        {"samples": 0, "corners": "none", "distillation": 0.0},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SupernetConfig(**wrong)


def test_a_checkpoint_is_written_whole_or_not_at_all(digits, tmp_path):
    path = tmp_path / "supernet.safetensors"
    train_supernet(tiny_supernet(digits), digits, dataclasses.replace(CONFIG, steps=3), seed=0, checkpoint=path)
    assert os.listdir(tmp_path) == [Path(path).name]


def test_one_architecture_trained_through_the_store_moves_as_it_would_plainly(digits):
    supernet = tiny_supernet(digits)
    architecture = tiny_space().sample(np.random.default_rng(0))
    plain = supernet.extract(architecture).train()
    before = weights(supernet)
    optimizers = [torch.optim.AdamW(parameter_groups(net, 0.05), lr=1e-2, fused=True) for net in (supernet, plain)]
    x, y = digits.train.gather(torch.arange(32))
    for _ in range(5):
        supernet.zero_grad()
        digits.training_loss(supernet.subnet(architecture).train()(x), y).backward()
        update(optimizers[0], supernet.touched([architecture]), 0.1)
        plain.zero_grad()
        digits.training_loss(plain(x), y).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizers[1].step()
    torch.testing.assert_close(dict(supernet.subnet(architecture).state_dict()), dict(plain.state_dict()))
    touched = {id(p) for p in supernet.touched([architecture])}
    idle = [name for name, p in supernet.named_parameters() if id(p) not in touched]
    assert idle
    after = weights(supernet)
    for name in idle:
        assert torch.equal(after[name], before[name])
    assert all(p.grad is not None for p in supernet.parameters())


# -- what a task decides -----------------------------------------------------------------------------------------


class Watched(Digits):
    """Counts what its sub-networks are trained on."""

    def __init__(self, answer: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.answer, self.calls = answer, {"training_loss": 0, "distillation": 0}

    def training_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls["training_loss"] += 1
        return super().training_loss(outputs, targets)

    def distillation(self, outputs: Tensor, teacher: Tensor, targets: Tensor) -> Tensor | None:
        self.calls["distillation"] += 1
        assert not teacher.requires_grad and teacher.shape == outputs.shape
        return None if self.answer is None else self.answer(outputs)


@pytest.mark.parametrize(
    ("share", "answer", "expected"),
    [
        (1.0, lambda outputs: outputs.square().mean(), {"training_loss": 5, "distillation": 10}),
        (0.5, lambda outputs: outputs.square().mean(), {"training_loss": 15, "distillation": 10}),
        (1.0, None, {"training_loss": 15, "distillation": 10}),  # it knows no way: all learn from the targets
        (0.0, None, {"training_loss": 15, "distillation": 0}),
    ],
)
def test_others_than_the_largest_learn_as_the_task_says(share, answer, expected):
    task = Watched(answer)
    config = dataclasses.replace(CONFIG, steps=5, distillation=share)  # of three sub-networks a step
    train_supernet(tiny_supernet(task), task, config, seed=0)
    assert task.calls == expected


def test_a_streamed_dense_task_is_learned():
    task = Signs()
    supernet = tiny_supernet(task)
    train_supernet(supernet, task, dataclasses.replace(CONFIG, steps=150, lr=2e-2), seed=0)
    rng = np.random.default_rng(0)
    assert max(evaluate(supernet.subnet(supernet.space.sample(rng)), task).score for _ in range(4)) > 0.9


class SwitchesOff(Digits):
    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        value = super().loss(outputs, targets, label_smoothing)
        torch.set_grad_enabled(False)
        return value


def test_gradients_that_a_loss_switches_off_are_on_again_for_others():
    task = SwitchesOff()
    with pytest.raises(RuntimeError):
        train_supernet(tiny_supernet(task), task, CONFIG, seed=0)
    assert torch.is_grad_enabled()


class Clock:
    """Time passes with each step alone: `slow` seconds for those behind the first `quick`, of `fast` each."""

    def __init__(self, fast: float, slow: float, quick: int) -> None:
        self.now, self.steps, self._fast, self._slow, self._quick = 0.0, 0, fast, slow, quick

    def perf_counter(self) -> float:
        return self.now

    def tick(self) -> None:
        self.steps += 1
        self.now += self._fast if self.steps <= self._quick else self._slow


def clocked(monkeypatch, clock: Clock) -> list[float]:
    """Let trainings go by this clock; the learning rate of each step that they take, those of probes being 0."""
    moved: list[float] = []
    train = training._Training._train

    def timed(self, *args: object, **kwargs: object) -> object:
        clock.tick()
        moved.append(args[-1])
        return train(self, *args, **kwargs)

    monkeypatch.setattr(training._Training, "_train", timed)
    monkeypatch.setattr(training, "time", clock)
    return moved


@pytest.mark.parametrize(("slow", "taken"), [(0.1, 100), (0.2, 67), (0.5, 47)])
def test_a_machine_that_becomes_slower_gets_fewer_steps(digits, tmp_path, monkeypatch, slow, taken):
    """40 s were 77 where a neighbour came; the steps that were planned were all taken."""
    clock = Clock(0.1, slow, 40)
    moved = clocked(monkeypatch, clock)
    config = dataclasses.replace(CONFIG, steps=None, seconds=10.0)
    watch = Watch()
    result = train_supernet(tiny_supernet(digits), digits, config, seed=0, report=watch, checkpoint=tmp_path / "store")
    assert watch.seen[0][1] == pytest.approx(96, abs=1)  # 10 s less four probes, at 0.1 s
    assert result.steps == len(watch.seen) and result.steps == pytest.approx(taken, abs=6)
    assert clock.now <= 10.0 * 1.2
    assert moved[-1] < 0.05 * max(moved)  # the learning rate came down all the same
    assert training.is_trained(tmp_path / "store")


def test_a_training_whose_first_steps_were_slow_gets_more(digits, tmp_path, monkeypatch):
    """Of a space with 60 mixers 25 steps were planned for 200 s, and took 39."""
    clock = Clock(1.0, 0.1, 8)
    moved = clocked(monkeypatch, clock)
    config = dataclasses.replace(CONFIG, steps=None, seconds=20.0)
    watch = Watch()
    result = train_supernet(tiny_supernet(digits), digits, config, seed=0, report=watch, checkpoint=tmp_path / "store")
    assert watch.seen[0][1] == pytest.approx(16, abs=1)  # 20 s less four probes, at 1 s
    assert result.steps == len(watch.seen) and 100 <= result.steps <= 124  # 12 s at 0.1 s, after four more at 1 s
    assert 18 <= clock.now <= 22
    assert moved[-1] < 0.05 * max(moved)  # the learning rate came down at the new end
