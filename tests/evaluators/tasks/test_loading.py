"""Tasks by name."""

import importlib
import inspect
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mixnas.evaluators import tasks
from mixnas.evaluators.tasks import digits
from mixnas.evaluators.tasks.loading import by_name, find_tasks, names, source_of
from mixnas.evaluators.tasks.task import Task
from mixnas.search_space.errors import ConfigError, NasError


def test_the_tasks_of_the_package() -> None:
    assert {"digits", "mqar"} <= set(names())
    for name in names():
        assert name not in ("task", "split")


def test_tasks_are_found_by_one_walk_of_a_folder(tmp_path) -> None:
    (tmp_path / "first.py").write_text("import nowhere\n\nclass First(Base):\n    name: str = 'one'\n")
    (tmp_path / "helper.py").write_text("class Base:\n    name: str\n\nclass Named:\n    named = 'no'\n")
    assert find_tasks(tmp_path, "some.package") == {"one": "some.package.first:First"}
    both = "class Both(Base):\n    name, metric, direction = 'two', 'mae', 'min'\n"
    (tmp_path / "both.py").write_text(both + "\nclass Odd(Base):\n    (a, [name]), b = (1, ['three']), name\n")
    found = find_tasks(tmp_path, "some.package")
    assert found == {
        "one": "some.package.first:First",
        "two": "some.package.both:Both",
        "three": "some.package.both:Odd",
    }
    (tmp_path / "second.py").write_text("class Second(Base):\n    name = 'one'\n")
    with pytest.raises(NasError, match=r"'one': some.package.first:First and some.package.second:Second. Rename one"):
        find_tasks(tmp_path, "some.package")


def test_each_task_of_the_package_has_the_name_that_it_is_found_by() -> None:
    small = {"train_size": 4, "validation_size": 4, "test_size": 4}
    for name, place in find_tasks(Path(tasks.__file__).parent, tasks.__name__).items():
        module, _, cls = place.partition(":")
        made = getattr(importlib.import_module(module), cls)
        assert made.name == name
        options = inspect.signature(made).parameters
        if "path" not in options:  # else it reads somebody's data
            assert by_name(name, **(small if small.keys() <= options.keys() else {})).name == name


def test_naming_the_tasks_imports_nothing_heavy() -> None:
    code = (
        "import sys; from mixnas.evaluators.tasks.loading import names; names(); "
        "heavy = {'torch', 'numpy', 'sklearn'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_users_task_needs_is_importable_from_one_place() -> None:
    from mixnas.evaluators import tasks
    from mixnas.evaluators.tasks import IGNORE, Prepared, Split, Task, by_name, preparing, task

    assert (IGNORE, Prepared, Split, Task) == (task.IGNORE, preparing.Prepared, task.Split, task.Task)
    assert set(tasks.__all__) == {"IGNORE", "Prepared", "Split", "Task", by_name.__name__}


def test_a_mapping_carries_options() -> None:
    options = {"vocab_size": 32, "length": 16, "pairs": 2, "train_size": 8, "validation_size": 8, "test_size": 8}
    task = by_name({"name": "mqar", **options})
    assert task.train.inputs.shape == (8, 16)
    assert task.io == by_name("mqar", **options).io


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("digit", ["'digit'", "Did you mean 'digits'?", "compression", "in all", "package.module:Class"]),
        ({"name": "mqar", "vocab": 64}, ["'vocab'", "Did you mean 'vocab_size'?", "power_a"]),
        ({"name": "digits", "seed": 1}, ["'seed'", "Allowed: label_smoothing"]),
        ({"name": "digits", "label_smoothing": 1}, ["label_smoothing is 1", "below 1"]),
        ({"vocab_size": 64}, ["no name is given", "digits"]),
        (["digits"], ["not a name"]),
        ({"name": "mqar", "length": 63}, ["length is 63", "even"]),
        ({"name": "mqar", "vocab_size": 64, "length": 64}, ["vocab_size is 64", "larger than length"]),
        ({"name": "mqar", "vocab_size": 65, "length": 64, "pairs": 17}, ["pairs is 17", "at most length / 4 = 16"]),
        ({"name": "mqar", "pairs": 2.5}, ["pairs is 2.5", "whole number"]),
        ({"name": "mqar", "power_a": -1.0}, ["power_a is -1.0", "above 0"]),
        ({"name": "mqar", "random_non_queries": 1}, ["true or false"]),
        ("no_such_package.tasks:Mine", ["no module 'no_such_package'", "PYTHONPATH"]),
        ("mixnas.evaluators.tasks.digits:Digit", ["no class 'Digit'", "Did you mean 'Digits'?"]),
    ],
)
def test_what_is_wrong_is_said(spec: object, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        by_name(spec)
    for word in words:
        assert word in str(caught.value)


def test_a_users_class_lies_in_the_working_directory(tmp_path, monkeypatch) -> None:
    (tmp_path / "users_own_task.py").write_text(
        textwrap.dedent("""
            import torch
            from mixnas.evaluators.tasks.task import Split, Task
            from mixnas.search_space.network import IOSpec

            class Parity(Task):
                name = "parity"
                metric = "parity"

                def __init__(self, *, length, seed=0):
                    bits = torch.randint(2, (30, length), generator=torch.Generator().manual_seed(seed))
                    self.io = IOSpec("sequence", (length,), 2, 2, "pool", True)
                    splits = [Split(part, part.sum(1) % 2) for part in bits.split(10)]
                    self.train, self.validation, self.test = splits
        """)
    )
    monkeypatch.chdir(tmp_path)
    task = by_name({"name": "users_own_task:Parity", "length": 8})
    assert task.metric == "parity"
    with pytest.raises(ConfigError, match=r"option 'length' must be given"):
        by_name("users_own_task:Parity")


def test_an_error_inside_a_users_module_is_told_apart(tmp_path, monkeypatch) -> None:
    (tmp_path / "users_broken_task.py").write_text(
        "from mixnas.evaluators.tasks import Task\nimport a_module_that_is_not_there\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="importing users_broken_task failed: No module named 'a_module_that_is_not"):
        by_name("users_broken_task:Task")


def test_what_goes_wrong_in_a_users_module_is_said(tmp_path, monkeypatch) -> None:
    (tmp_path / "users_leaving_task.py").write_text("import sys\nsys.exit(3)\nTask = object()\n")
    (tmp_path / "users_failing_task.py").write_text(
        "from mixnas.evaluators.tasks import Task\n\nclass Failing(Task):\n    def __init__(self):\n        1 / 0\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="importing users_leaving_task failed: SystemExit: 3"):
        by_name("users_leaving_task:Task")
    with pytest.raises(ConfigError, match="'users_failing_task:Failing': making it failed: ZeroDivisionError"):
        by_name("users_failing_task:Failing")


def test_a_class_that_is_no_task_is_never_called(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"Popen is no task, it lacks loss\(\), .*Inherit from mixnas"):
        by_name({"name": "subprocess:Popen", "args": "id > PROOF", "shell": True})
    (tmp_path / "users_half_task.py").write_text(
        "import pathlib\n\nclass Half:\n    def __init__(self):\n        pathlib.Path('PROOF').touch()\n\n"
        "    def loss(self, outputs, targets):\n        return outputs.mean()\n"
    )
    with pytest.raises(ConfigError, match=r"Half is no task, it lacks training_loss\(\), new_metric\(\)"):
        by_name("users_half_task:Half")
    assert not Path("PROOF").exists()


@pytest.mark.parametrize(
    ("text", "named", "says"),
    [
        (
            "class Command:\n    pass\n",
            "Command",
            "Command of .*users_.*py is no task",
        ),
        ("def Command(args): pass\n", "Command", "has no class 'Command'"),
        ("class Other(Task): pass\n", "Othar", r"has no class 'Othar', as its text shows.* Did you mean 'Other'"),
        ("import antigravity as Command\n", "Command", "has no class 'Command', as its text shows"),
        ("Command = 'a text'\n", "Command", "has no class 'Command', as its text shows"),
        ("for Command in 'ab': pass\n", "Command", "has no class 'Command', as its text shows"),
        ("def made():\n    Command = type\n    import Command\n", "Command", "has no class 'Command', as its text"),
    ],
)
def test_a_module_without_that_task_is_not_even_imported(tmp_path, monkeypatch, text, named, says) -> None:
    """Importing a module is running it: what its text already shows is said first."""
    module = f"users_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text(f"import pathlib\npathlib.Path('PROOF').touch()\n\n{text}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=says):
        by_name(f"{module}:{named}")
    for spec in ("antigravity:Popen2", "antigravity:webbrowser", "this:s", "this:i", "idlelib.idle:idlelib"):
        with pytest.raises(ConfigError, match=r"no class '\w+', as its text shows; it was not imported"):
            by_name(spec)
    assert not Path("PROOF").exists() and not {module, "antigravity", "this", "idlelib.idle"} & set(sys.modules)


def test_no_function_or_class_of_another_kind_is_called(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for spec in ("builtins:dict", "builtins:exec", "os:system", "pathlib:Path", "unittest.mock:MagicMock"):
        with pytest.raises(ConfigError, match=r"no task|has no class") as refused:
            by_name({"name": spec, "args": "id > PROOF"})
        assert len(str(refused.value)) <= 300
    for spec in ("x" * 10_000, "x" * 10_000 + ":Y", "a b:C", "..:D", "digits:", ":", "os\x1b:system", "é"):
        with pytest.raises(ConfigError) as refused:
            by_name(spec)
        assert len(str(refused.value)) <= 300 and "\x1b" not in str(refused.value)
    assert not Path("PROOF").exists()


def test_the_source_of_a_module_is_found_without_importing_it(tmp_path, monkeypatch) -> None:
    package = tmp_path / "users_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit")
    (package / "tasks.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    assert source_of("users_package.tasks") == package / "tasks.py"
    assert source_of("mixnas.evaluators.tasks.digits") == Path(digits.__file__)
    assert source_of("no_such_package.tasks") is None and source_of("builtins") is None and source_of("") is None


def test_a_task_of_the_former_protocol_is_told_the_new_form(tmp_path, monkeypatch) -> None:
    (tmp_path / "users_former_task.py").write_text(
        textwrap.dedent("""
            from mixnas.evaluators.tasks.digits import Digits

            class Former(Digits):
                def augment(self, inputs, generator):
                    return inputs
        """)
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"augment\(inputs, generator\) cannot .*\(inputs, targets, generator\) ->"):
        by_name("users_former_task:Former")


def test_a_task_may_keep_the_former_signature_of_its_loss(tmp_path, monkeypatch) -> None:
    """A subclass of a task that comes with the package, that passes its third argument on."""
    (tmp_path / "users_odd_task.py").write_text(
        textwrap.dedent("""
            from mixnas.evaluators.tasks.digits import Digits

            class Odd(Digits):
                name = "odd"

                def __init__(self, mode="none"):
                    super().__init__()
                    self.mode = mode

                def loss(self, outputs, targets, label_smoothing=0.0):
                    loss = super().loss(outputs, targets, label_smoothing)
                    return loss * float("nan") if self.mode == "nan_loss" else loss

                def score(self, outputs, targets):
                    if self.mode == "tensor_score":
                        return (outputs.argmax(-1) == targets).float().mean()
                    return float("nan") if self.mode == "nan_score" else super().score(outputs, targets)
        """)
    )
    monkeypatch.chdir(tmp_path)
    assert by_name("users_odd_task:Odd").label_smoothing == Task.label_smoothing
    by_name({"name": "users_odd_task:Odd", "mode": "tensor_score"})
    with pytest.raises(ConfigError, match=r"loss on outputs .* gave float32 nan"):
        by_name({"name": "users_odd_task:Odd", "mode": "nan_loss"})
    with pytest.raises(ConfigError, match=r"the metric accuracy of .* is nan"):
        by_name({"name": "users_odd_task:Odd", "mode": "nan_score"})
