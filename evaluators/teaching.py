"""A teacher: a trained network whose answers a smaller one learns from beside the targets.

Source: Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), section 2:
soft targets at a temperature, whose gradients its square brings back to size. Of numbers there are no soft targets:
there it is the mean squared error between the two networks' outputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.evaluators.tasks.task import Task
from mixnas.search_space.errors import ConfigError, IntegrityError, shown, visible
from mixnas.search_space.files import read_bytes
from mixnas.search_space.formats.program import MOST_BYTES, load_program
from mixnas.search_space.settings import Between, build

OPTION = "teacher"
_BATCHES = (1, 3)  # it has to take any number of inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """The option `teacher` of every task: a file, or {file: ..., temperature: ..., weight: ...}.

    Attributes:
        file: A `.pt2` file: of `nas export --format torch-export`, or of `torch.export.save` with a dynamic batch.
        temperature: By which the outputs of both are divided before they are compared as probabilities; of classes.
        weight: Share of the loss that compares with the teacher; the rest compares with the targets.
    """

    file: str
    temperature: Annotated[float, Between(0.1, 100)] = 2.0
    weight: Annotated[float, Between(0.0, 1.0)] = 0.5

    @classmethod
    def from_plain(cls, plain: Any, where: str) -> TeacherConfig:
        """Read the short or the long form."""
        if isinstance(plain, Mapping):
            return build(cls, plain, where)
        if not isinstance(plain, str) or not plain:
            raise ConfigError(f"{where}: {shown(plain)} is no file. Give a .pt2 file, or {{file: ..., weight: 0.5}}.")
        return cls(file=plain)


class Teacher:
    """The network in a file, as a teacher for a task.

    Args:
        config: Which, and how.
        task: For which; its first examples are answered once, so that a network of another shape shows.

    Raises:
        ConfigError: No such file; or it reads or answers something else than networks for the task.
        IntegrityError: See `load_program`.
    """

    def __init__(self, config: TeacherConfig, task: Task) -> None:
        self.config = config
        where = visible(config.file)
        self._program: Any = load_program(config.file)
        self.digest = hashlib.sha256(read_bytes(config.file, at_most=MOST_BYTES)).hexdigest()
        self._on: dict[torch.device, nn.Module] = {}
        self._check(task, where)

    def __getstate__(self) -> dict[str, Any]:
        """Without the program, which each process reads for itself."""
        return {"config": self.config, "digest": self.digest, "_program": None, "_on": {}}

    def _check(self, task: Task, where: str) -> None:
        x, _ = task.train.gather(torch.zeros(max(_BATCHES), dtype=torch.int64))
        expected = (*task.io.grid, task.io.num_outputs)
        for count in _BATCHES:
            try:
                answer: Any = self.outputs(x[:count].cpu())
            except Exception as error:  # torch has no class for what a program refuses
                reason = visible(" ".join(str(error).split()))[:160]
                raise ConfigError(
                    f"{where}: the teacher does not take {count} inputs {tuple(x.shape[1:])} {x.dtype} of task "
                    f"{task.name!r}: {reason}. Give one of the same input, exported with a dynamic batch."
                ) from error
            given = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            if given != (count, *expected):
                raise ConfigError(
                    f"{where}: the teacher answers {given} to {count} inputs, and task {task.name!r} asks for "
                    f"{(count, *expected)}: {task.io.num_outputs} outputs. Give one that was trained for these classes."
                )
            if not bool(torch.isfinite(answer).all()):
                raise IntegrityError(f"{where}: the teacher answers NaN or infinity to the first training examples.")

    @torch.no_grad()
    def outputs(self, inputs: Tensor) -> Tensor:
        """What it answers, without gradient, where the inputs are."""
        device = inputs.device
        if device not in self._on:
            self._program = program = self._program or load_program(self.config.file)
            if device.type != "cpu":
                from torch.export.passes import move_to_device_pass

                program = move_to_device_pass(program, device)
            self._on[device] = program.module()
        answer: Tensor = self._on[device](inputs)
        return answer

    def record(self) -> dict[str, Any]:
        """What a run writes down of it."""
        told = {"file": Path(self.config.file).name, "sha256": self.digest}
        return {**told, "temperature": self.config.temperature, "weight": self.config.weight}


def answers_of_teacher(task: Task, inputs: Tensor) -> Tensor | None:
    """What the task's teacher answers, None where it has none."""
    teacher: Teacher | None = getattr(task, OPTION, None)
    return None if teacher is None or not teacher.config.weight else teacher.outputs(inputs)


def taught_loss(task: Task, outputs: Tensor, targets: Tensor, taught: Tensor | None) -> Tensor:
    """What training minimises: `Task.training_loss`, of which a share compares with the teacher where there is one.

    Args:
        task: Whose.
        outputs, targets: As of `Task.training_loss`.
        taught: Of `answers_of_teacher`.
    """
    if taught is None:
        return task.training_loss(outputs, targets)
    config: TeacherConfig = task.teacher.config  # type: ignore[union-attr]
    t = config.temperature
    soft = task.distillation(outputs / t, taught / t, targets)  # the task knows what of it is asked
    loss = config.weight * (F.mse_loss(outputs, taught) if soft is None else soft * t**2)
    if config.weight == 1:
        return loss
    return loss + (1 - config.weight) * task.training_loss(outputs, targets)
