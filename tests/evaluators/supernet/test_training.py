"""Training one super-network on real data, stopping and resuming it, sharing it between processes, judging with it."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import Tensor

from mixnas.evaluators.supernet import judging as inherited
from mixnas.evaluators.supernet.judging import SupernetEvaluator, fine_tune
from mixnas.evaluators.supernet.processes import processes
from mixnas.evaluators.supernet.sampling import FairSampler
from mixnas.evaluators.supernet.training import SupernetConfig, distillation_loss, load_supernet, train_supernet, update
from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.task import IGNORE, Task
from mixnas.evaluators.training import TrainConfig, evaluate, parameter_groups
from mixnas.search_space.errors import ConfigError, IntegrityError, NasError, StoppedEarly
from mixnas.search_space.network import cost, plan
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.supernet import Supernet


def tiny_space(norm: object = "layer") -> SearchSpace:
    block = {
        "mixer": ["identity", {"name": "dwconv", "kernel_size": [3, 5]}, {"name": "attention", "heads": 2}],
        "gate": ["none", "se"],
        "channel_mixer": {"name": "mlp", "expansion": [1, 2]},
    }
    stage = {"width": [4, 8], "depth": [1, 2], "block": block}
    return SearchSpace.from_dict({"stem": {"name": "conv", "stride": 2}, "norm": norm, "stages": [stage]})


@pytest.fixture(scope="module")
def digits() -> Task:
    return by_name("digits")


def tiny_supernet(task: Task, norm: object = "layer") -> Supernet:
    return Supernet(tiny_space(norm), task.io, torch.Generator().manual_seed(0))


CONFIG = SupernetConfig(steps=20, batch_size=32, samples=1, checkpoint_every=0)


def weights(supernet: Supernet) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in supernet.state_dict().items()}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# -- sampling ----------------------------------------------------------------------------------------------------


def test_every_operator_is_dealt_equally_often_at_every_place(digits):
    sampler = FairSampler(tiny_space(), seed=0)
    drawn = [architecture for _ in range(60) for architecture in sampler.step(2)]
    for b in range(2):
        blocks = [architecture.stages[0].blocks[b] for architecture in drawn if len(architecture.stages[0].blocks) > b]
        for counts in (Counter(block.mixer.name for block in blocks), Counter(block.gate.name for block in blocks)):
            assert max(counts.values()) - min(counts.values()) <= 1
    assert len({architecture.id for architecture in drawn}) > 100


def test_a_sandwich_has_the_extremes_of_every_size(digits):
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


# -- training ----------------------------------------------------------------------------------------------------


def test_training_teaches_all_subnetworks(digits):
    supernet = tiny_supernet(digits)
    rng = np.random.default_rng(0)
    architectures = [supernet.space.sample(rng) for _ in range(6)]
    untrained = [evaluate(supernet.subnet(a), digits).loss for a in architectures]
    steps = []
    config = dataclasses.replace(CONFIG, steps=300, lr=3e-2, distillation=0.5)
    result = train_supernet(supernet, digits, config, seed=0, progress=lambda *given: steps.append(given[:3]))
    trained = [evaluate(supernet.subnet(a), digits) for a in architectures]
    assert all(after.loss < before for after, before in zip(trained, untrained, strict=True))
    assert max(metrics.score for metrics in trained) > 0.4
    assert (result.steps, result.subnets) == (300, 900)
    assert [(step, total) for step, total, _ in steps] == [(i + 1, 300) for i in range(300)]
    assert result.loss == pytest.approx(np.mean([loss for _, _, loss in steps[-33:]]))


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
    assert not torch.equal(results[0]["head.linear.weight"], results[2]["head.linear.weight"])


def train_until(task: Task, norm: str, path: Path, last: int | None) -> tuple[Supernet, int]:
    """In a new store, from the checkpoint there is, to step `last` or the end; returns the steps done."""
    supernet, done = tiny_supernet(task, norm), 0

    def count(step: int, *_: object) -> None:
        nonlocal done
        done = step

    def stop() -> bool:
        return last is not None and done >= last - 1

    with contextlib.nullcontext() if last is None else pytest.raises(StoppedEarly):
        train_supernet(supernet, task, CONFIG, seed=0, checkpoint=path, progress=count, should_stop=stop)
    return supernet, done


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_stopped_training_resumes_to_the_same_weights(digits, tmp_path, norm):
    """Stopped in the warm-up, in the middle of an epoch and before the last step, each time into a new store."""
    whole = tiny_supernet(digits, norm)
    result = train_supernet(whole, digits, CONFIG, seed=0)
    path = tmp_path / "supernet.safetensors"
    for last in (1, 7, 19):
        _, done = train_until(digits, norm, path, last)
        assert done == last
    resumed, done = train_until(digits, norm, path, None)
    assert done == result.steps
    assert_equal(weights(whole), weights(resumed))
    again, done = train_until(digits, norm, path, None)
    assert done == 0  # it was finished
    assert_equal(weights(whole), weights(again))


_TRAIN = """
import sys, torch
torch.set_num_threads(1)
from {module} import CONFIG, tiny_supernet
from mixnas.evaluators.supernet.training import train_supernet
from mixnas.evaluators.tasks.loading import by_name
task = by_name("digits")
supernet = tiny_supernet(task)
train_supernet(supernet, task, CONFIG, seed=0, checkpoint=sys.argv[1], progress=lambda s, *_: print(s, flush=True))
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
    command = [sys.executable, "-c", _TRAIN.format(module=__name__), str(path)]
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
    judged_otherwise = dataclasses.replace(short, probe=64, checkpoint_every=60.0)  # the same training
    assert train_supernet(tiny_supernet(digits), digits, judged_otherwise, seed=0, checkpoint=path).steps == 2
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(IntegrityError):
        load_supernet(tiny_supernet(digits), path)


def test_a_time_budget_decides_the_steps_once(digits, tmp_path):
    path = tmp_path / "supernet.safetensors"
    config = dataclasses.replace(CONFIG, steps=None, seconds=1.5)
    untouched, supernet = weights(tiny_supernet(digits)), tiny_supernet(digits)
    seen = []

    def stop_at_once(step: int, steps: int, *_: object) -> None:
        seen.append(steps)

    with pytest.raises(StoppedEarly):
        train_supernet(
            supernet, digits, config, seed=0, checkpoint=path, progress=stop_at_once, should_stop=lambda: True
        )
    assert seen[0] > 4
    # Measuring has trained nothing: as many steps asked for by number give the same weights.
    resumed = tiny_supernet(digits)
    result = train_supernet(resumed, digits, config, seed=0, checkpoint=path)
    assert result.steps == seen[0]
    by_number = tiny_supernet(digits)
    train_supernet(by_number, digits, dataclasses.replace(CONFIG, steps=seen[0]), seed=0)
    assert_equal(weights(resumed), weights(by_number))
    assert not torch.equal(weights(resumed)["head.linear.weight"], untouched["head.linear.weight"])


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


def test_distillation_is_the_soft_cross_entropy_over_what_is_labelled():
    generator = torch.Generator().manual_seed(0)
    outputs, teacher = (torch.randn(3, 5, 7, generator=generator) for _ in range(2))
    targets = torch.randint(7, (3, 5), generator=generator)
    targets[0] = targets[2, 1:] = IGNORE
    labelled = (targets != IGNORE).flatten()
    expected = torch.nn.functional.cross_entropy(
        outputs.flatten(0, 1)[labelled], teacher.flatten(0, 1)[labelled].softmax(-1)
    )
    torch.testing.assert_close(distillation_loss(outputs, teacher, targets), expected)


# -- several processes -------------------------------------------------------------------------------------------


def test_a_helping_process_takes_its_share_from_where_the_first_is(digits, tmp_path):
    """Begun by one process, gone on with by two: the weights of one process alone, to round-off."""
    # Adam divides by gradients that are nearly zero at the start, which makes much of round-off: few, small steps.
    config = dataclasses.replace(CONFIG, steps=6, lr=1e-3)
    path = tmp_path / "supernet.safetensors"
    with pytest.raises(StoppedEarly):
        train_supernet(tiny_supernet(digits), digits, config, seed=0, checkpoint=path, should_stop=lambda: True)
    threads = torch.get_num_threads()
    supernet = tiny_supernet(digits)
    train_supernet(supernet, digits, dataclasses.replace(config, processes=2), seed=0, checkpoint=path)
    assert (torch.get_num_threads(), dist.is_initialized()) == (threads, False)
    alone = tiny_supernet(digits)
    train_supernet(alone, digits, config, seed=0)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(supernet)[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_a_helper_that_fails_is_reported(tmp_path):
    with pytest.raises(NasError, match="helping process"), processes(2, _fail):
        dist.all_reduce(torch.zeros(1))
    assert not dist.is_initialized()


def _fail() -> None:
    raise SystemExit(3)


def _train_with_another(rank: int, path: str, config: SupernetConfig) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
    try:
        task = by_name("digits")
        supernet = tiny_supernet(task)
        train_supernet(supernet, task, config, seed=0, checkpoint=f"{path}/supernet.safetensors")
        torch.save(weights(supernet), f"{path}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_of_a_group_do_what_one_does_with_the_joined_batch(digits, tmp_path):
    config = dataclasses.replace(CONFIG, steps=6, lr=1e-3)
    torch.multiprocessing.spawn(_train_with_another, args=(str(tmp_path), config), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert_equal(first, second)
    alone = tiny_supernet(digits)
    initial = weights(alone)
    train_supernet(alone, digits, config, seed=0)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    moved = max((tensor - initial[name]).abs().max() for name, tensor in weights(alone).items())
    assert moved > 2e-3
    loaded = tiny_supernet(digits)
    load_supernet(loaded, tmp_path / "supernet.safetensors")
    assert_equal(first, weights(loaded))


# -- judging -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [["layer", "rms"], ["layer", "batch"]])
@pytest.mark.parametrize("probe", [0, 300])
def test_many_judged_together_score_as_each_alone(digits, norm, probe):
    supernet = tiny_supernet(digits, norm)
    train_supernet(supernet, digits, CONFIG, seed=0)
    rng = np.random.default_rng(0)
    architectures = [supernet.space.sample(rng) for _ in range(24)]
    together = SupernetEvaluator(supernet, digits, latency=lambda a: float(len(a.stages[0].blocks)), probe=probe)
    found = together.evaluate_many([*architectures, architectures[3]])
    assert found[-1] == found[3]
    for architecture, metrics in zip(architectures, found, strict=False):
        alone = SupernetEvaluator(supernet, digits, probe=probe)(architecture)
        assert {**alone, "latency_ms": float(len(architecture.stages[0].blocks))} == metrics
        assert tuple(metrics) == together.metrics
        extracted = supernet.extract(architecture)
        if architecture.norm.name != "batch" and not probe:
            judged = evaluate(extracted, digits)
            assert (metrics["accuracy"], metrics["loss"]) == pytest.approx((judged.score, judged.loss))
        assert metrics["params"] == cost(architecture, digits.io).params


def test_what_is_shared_is_computed_once(digits):
    supernet = tiny_supernet(digits)
    rng = np.random.default_rng(0)
    architectures = list(dict.fromkeys(supernet.space.sample(rng) for _ in range(40)))
    evaluator = SupernetEvaluator(supernet, digits)
    calls: Counter[str] = Counter()
    counted = set()
    for architecture in architectures:
        for name, module in supernet.subnet(architecture).units():
            if id(module) not in counted:
                counted.add(id(module))
                module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    evaluator.evaluate_many(architectures)
    planned = [plan(architecture, digits.io) for architecture in architectures]
    assert calls["stem"] == len({units[0] for units in planned})
    assert calls["stages.0.blocks.0"] == len({units[:2] for units in planned})
    before = calls.total()
    evaluator.evaluate_many(architectures)
    assert calls.total() == before
    evaluator.forget()
    evaluator(architectures[0])
    assert calls.total() > before


def test_a_probe_is_the_logistic_regression_on_the_features(digits, monkeypatch):
    """Against scikit-learn's, where the inherited last layer is zero, so that staying close to it is shrinkage."""
    stay = 1e-4
    for name, value in (("_PROBE_STEPS", 500), ("_PROBE_STAY", stay), ("_PROBE_SMOOTHING", 0.0)):
        monkeypatch.setattr(inherited, name, value)
    supernet = tiny_supernet(digits)
    *body, (_, head) = supernet.subnet(supernet.largest()).eval().units()
    head.linear.weight.data.zero_()
    before = weights(supernet)
    probed = SupernetEvaluator(supernet, digits, probe=10**6)(supernet.largest())  # as many as there are
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
    plain = SupernetEvaluator(supernet, digits)(supernet.largest())
    assert probed["loss"] < 0.8 * plain["loss"] and probed["accuracy"] > 2 * plain["accuracy"]


def test_fine_tuning_starts_from_inherited_weights_and_leaves_the_store_alone(digits):
    supernet = tiny_supernet(digits)
    train_supernet(supernet, digits, dataclasses.replace(CONFIG, steps=100, lr=2e-2), seed=0)
    before = weights(supernet)
    architecture = supernet.largest()
    begun_with = evaluate(supernet.subnet(architecture), digits)
    config = TrainConfig(steps=40, lr=1e-3)
    losses = {}
    for inherit in (True, False):
        network, result = fine_tune(
            supernet, architecture, digits, config, generator=torch.Generator().manual_seed(0), inherit=inherit
        )
        assert (result.steps, network.architecture) == (40, architecture)
        losses[inherit] = evaluate(network, digits).loss
    assert losses[True] < begun_with.loss < losses[False]
    assert_equal(before, weights(supernet))


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
    x, y = digits.train.inputs[:32], digits.train.targets[:32]
    for _ in range(5):
        supernet.zero_grad()
        digits.loss(supernet.subnet(architecture).train()(x), y, 0.1).backward()
        update(optimizers[0], supernet.touched([architecture]), 0.1)
        plain.zero_grad()
        digits.loss(plain(x), y, 0.1).backward()
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
