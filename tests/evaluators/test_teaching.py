"""Learning from a network that was trained before."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mixnas.evaluators.supernet.training import SupernetConfig, train_supernet
from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.task import Split, Task, recorded
from mixnas.evaluators.teaching import TeacherConfig, answers_of_teacher, taught_loss
from mixnas.evaluators.training import TrainConfig, evaluate, train
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.formats.torch_export import TorchExport
from mixnas.search_space.network import Network
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.supernet import Supernet
from mixnas.search_space.units import IOSpec

STEM = {"name": "conv", "kernel_size": 3, "stride": 2}
BLOCK = {"mixer": {"name": "dwconv", "kernel_size": 3}, "channel_mixer": "mlp"}
ARCHITECTURE = Architecture.from_dict({"stem": STEM, "stages": [{"width": 16, "blocks": [BLOCK]}]})


def network(io: IOSpec, seed: int = 0) -> Network:
    return Network(ARCHITECTURE, io, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def digits() -> Task:
    return by_name("digits")


@pytest.fixture(scope="module")
def trained(digits) -> Network:
    found = network(digits.io)
    train(found, digits, TrainConfig(steps=300, lr=8e-3), generator=torch.Generator().manual_seed(0))
    return found.eval()


@pytest.fixture(scope="module")
def file(trained, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt2"
    TorchExport().write(trained, path, {})
    return str(path)


def of_program(module: nn.Module, x: torch.Tensor, path) -> str:
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    torch.export.save(torch.export.export(module.eval(), (x,), dynamic_shapes=shapes, strict=False), path)
    return str(path)


def test_the_teacher_answers_as_it_did_when_it_was_exported(digits, trained, file):
    task = by_name("digits", teacher=file)
    x, _ = task.test.gather(torch.arange(40))
    torch.testing.assert_close(answers_of_teacher(task, x), trained(x), atol=1e-5, rtol=1e-5)
    again = pickle.loads(pickle.dumps(task))  # it goes to the processes that train together
    torch.testing.assert_close(answers_of_teacher(again, x), answers_of_teacher(task, x))
    assert answers_of_teacher(digits, x) is None
    assert recorded(task)["teacher"].keys() == {"file", "sha256", "temperature", "weight"}


def test_the_loss_is_hintons(file):
    task = by_name("digits", teacher={"file": file, "temperature": 3.0, "weight": 0.25}, label_smoothing=0.1)
    x, y = task.train.gather(torch.arange(16))
    outputs = torch.randn(16, 10, generator=torch.Generator().manual_seed(1))
    taught = answers_of_teacher(task, x)
    soft = F.kl_div((outputs / 3).log_softmax(-1), (taught / 3).softmax(-1), reduction="batchmean")
    soft = soft + torch.distributions.Categorical(logits=taught / 3).entropy().mean()  # cross-entropy
    hard = F.cross_entropy(outputs, y, label_smoothing=0.1)
    torch.testing.assert_close(taught_loss(task, outputs, y, taught), 0.25 * 9 * soft + 0.75 * hard)


def test_a_network_learns_from_a_teacher_alone(digits, trained, file):
    """No label is seen: wrong ones do no harm."""
    task = by_name("digits", teacher={"file": file, "weight": 1.0})
    x, y = task.train.gather(torch.arange(len(task.train)))
    task.train = Split(x, (y + 1) % 10)
    pupil = network(task.io, seed=5)
    train(pupil, task, TrainConfig(steps=300, lr=8e-3), generator=torch.Generator().manual_seed(1))
    score, of_teacher = evaluate(pupil, digits, "test").score, evaluate(trained, digits, "test").score
    assert of_teacher > 0.8
    assert score > of_teacher - 0.1


class Heights(Task):
    name, metric, direction = "heights", "mae", "min"
    io = IOSpec("sequence", (6,), in_features=1, num_outputs=1)

    def __init__(self) -> None:
        x = torch.randn(40, 6, 1, generator=torch.Generator().manual_seed(0))
        self.train = self.validation = self.test = Split(x, x.mean((1, 2)))

    def loss(self, outputs, targets):
        return (outputs.squeeze(-1) - targets).square().mean()

    def score(self, outputs, targets):
        return (outputs.squeeze(-1) - targets).abs().mean()


def test_of_numbers_it_is_the_squared_error(tmp_path):
    path = of_program(nn.Sequential(nn.Flatten(), nn.Linear(6, 1)), torch.zeros(2, 6, 1), tmp_path / "heights.pt2")
    task = by_name(f"{__name__}:Heights", teacher={"file": path, "weight": 0.5})
    x, y = task.train.gather(torch.arange(8))
    taught, outputs = answers_of_teacher(task, x), torch.zeros(8, 1)
    expected = 0.5 * taught.square().mean() + 0.5 * y.square().mean()
    torch.testing.assert_close(taught_loss(task, outputs, y, taught), expected)


def test_a_super_network_is_taught_too(file, tmp_path):
    space = SearchSpace.from_dict({"stem": STEM, "stages": [{"width": [8, 16], "block": BLOCK}]})
    found = {}
    for told in (None, {"file": file, "weight": 1.0}):
        task = by_name("digits", at_most=64, **({"teacher": told} if told else {}))
        supernet = Supernet(space, task.io, torch.Generator().manual_seed(0))
        config = SupernetConfig(steps=2, batch_size=16, samples=1, corners="largest", augment=False)
        train_supernet(supernet, task, config, seed=0)
        found[told is None] = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    assert any(not torch.equal(found[True][name], found[False][name]) for name in found[True])


def test_what_does_not_fit_is_refused_before_training(file, tmp_path):
    x = torch.zeros(2, 8, 8, 1)
    five = of_program(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), x, tmp_path / "five.pt2")
    with pytest.raises(ConfigError, match=r"five\.pt2: the teacher answers \(1, 5\).*\(1, 10\)"):
        by_name("digits", teacher=five)
    other = of_program(nn.Sequential(nn.Flatten(), nn.Linear(36, 10)), torch.zeros(2, 6, 6, 1), tmp_path / "six.pt2")
    with pytest.raises(ConfigError, match=r"six\.pt2: the teacher does not take 1 inputs \(8, 8, 1\)"):
        by_name("digits", teacher=other)
    fixed = torch.export.export(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval(), (x[:1],), strict=False)
    torch.export.save(fixed, tmp_path / "fixed.pt2")
    with pytest.raises(ConfigError, match=r"does not take 3 inputs.*dynamic batch"):
        by_name("digits", teacher=str(tmp_path / "fixed.pt2"))
    with pytest.raises(ConfigError, match=r"none\.pt2: no such file"):
        by_name("digits", teacher="none.pt2")
    for wrong in ({"file": file, "weight": 2.0}, {"file": file, "heat": 1}, 3):
        with pytest.raises(ConfigError, match="teacher"):
            by_name("digits", teacher=wrong)
    assert TeacherConfig.from_plain(file, "") == TeacherConfig(file=file)
