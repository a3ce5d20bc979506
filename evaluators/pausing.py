"""A training that is left off and gone on with elsewhere, as if it had never been left: bit for bit, on a CPU.

What it takes is plain: weights and buffers, the optimiser's moments, the moving average, where in the examples it was
and the generators. A schedule is that of the whole training, so that what is judged on the way is a moment of the
training that would have been anyway.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixnas.evaluators.batches import Batches
from mixnas.search_space.errors import NasError

FORMAT = 1


class NotThisTrainingError(NasError):
    """A state is damaged, of another training or of a later step: whoever has it begins anew."""


class Stream:
    """Batches, epoch after epoch, that remembers where it is.

    Args:
        batches: Where they come from.
        generator: On the device; as it was when the current epoch began, where `taken` is not 0.
        taken: Batches of that epoch that were taken before; they are drawn again, and not given.
    """

    def __init__(self, batches: Batches, generator: torch.Generator, taken: int = 0) -> None:
        self._batches, self._generator = batches, generator
        self._begin(taken)

    def _begin(self, taken: int) -> None:
        self.begun, self.taken = self._generator.get_state(), taken
        self._epoch: Iterator[tuple[Tensor, Tensor]] = self._batches.epoch(self._generator, skip=taken)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        while True:
            for batch in self._epoch:
                self.taken += 1
                return batch
            self._begin(0)


def captured(
    of: str,
    step: int,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Sequence[Tensor],
    stream: Stream,
    losses: Sequence[Tensor],
    device: torch.device,
) -> bytes:
    """All that a training needs to go on, after a step.

    Args:
        of: Says which training it is.
        step: How many are done.
        network, optimizer, average, stream: As they are.
        losses: Of the latest steps.
        device: Where it is trained.
    """
    plain = {
        "format": FORMAT,
        "of": of,
        "step": step,
        "tensors": _tensors(network),
        "optimizer": optimizer.state_dict(),
        "average": list(average),
        "epoch": stream.begun,
        "taken": stream.taken,
        "losses": torch.stack(list(losses)) if losses else torch.zeros(0),
        "random": torch.default_generator.get_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }
    written = io.BytesIO()
    torch.save(plain, written)
    return written.getvalue()


def opened(state: bytes, of: str, until: int) -> dict[str, Any]:
    """A state, read without executing anything of it.

    Args:
        state: What `captured` gave.
        of: Which training it has to be of.
        until: A step that it must not be beyond.

    Raises:
        NotThisTrainingError: It is none.
    """
    try:
        plain = torch.load(io.BytesIO(state), map_location="cpu", weights_only=True)
        if plain["format"] != FORMAT or plain["of"] != of or plain["step"] > until:
            raise NotThisTrainingError("the state is of another training, or of a later step of this one.")
        found: dict[str, Any] = plain
        return found
    except NotThisTrainingError:
        raise
    except Exception as error:  # torch names no class for a file that is cut off
        raise NotThisTrainingError(f"the state cannot be read: {error}") from error


def restore(
    plain: dict[str, Any], network: nn.Module, optimizer: torch.optim.Optimizer, average: Sequence[Tensor]
) -> None:
    """Put weights, buffers, moments and average back, in place.

    Raises:
        NotThisTrainingError: The network has other ones.
    """
    there, kept = _tensors(network), plain["tensors"]
    if {n: t.shape for n, t in there.items()} != {n: t.shape for n, t in kept.items()}:
        raise NotThisTrainingError("the state is of another network.")
    with torch.no_grad():
        for name, tensor in there.items():
            tensor.copy_(kept[name])
        for mine, its in zip(average, plain["average"], strict=True):
            mine.copy_(its)
    optimizer.load_state_dict(plain["optimizer"])


def restore_random(plain: dict[str, Any], device: torch.device) -> None:
    """Put PyTorch's global generators back to where the training had them."""
    torch.default_generator.set_state(plain["random"])
    if device.type == "cuda" and plain["cuda"] is not None:
        torch.cuda.set_rng_state(plain["cuda"], device)


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers; those that a file of weights leaves out are worked out anew, some at the first input."""
    return {name: value.detach() for name, value in network.state_dict().items() if isinstance(value, Tensor)}
