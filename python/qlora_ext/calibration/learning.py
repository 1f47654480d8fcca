"""Learns the codes of weights, so that what a block or a whole quantized model computes is what the dense one does.

Adam moves each weight, and a low-rank term of the whole matrix, which finds with few steps what many weights have in
common. Their sum is rounded to the nearest codes in every step, and the gradient passes through the rounding unchanged
(Bengio et al., 2013). Scales and offsets stay those of the calibration: to learn them, too, gained nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..formats import code_values
from ..weight import Weight4bit
from .store import Progress
from .weighted_encoding import encoded_under

DISTILLED = "distilled"
BYTES_PER_WEIGHT = 32  # eight float32 values while a weight is learnt
_HELD_OUT = 8  # of so many batches, the last one decides whether what was learnt is better
_RANK = 16
_SAVE_SECONDS = 600.0
_BEST = "best/"


class Schedule(NamedTuple):
    """How fast and how long weights are learnt.

    Attributes:
        rate: of Adam for single weights, in units of the largest value of a quantization block.
        low_rank_rate: for both factors of the low-rank term, whose product is in units of the mean of these largest
            values. Both rates fall linearly to zero.
        passes: over the text.
    """

    rate: float
    low_rank_rate: float
    passes: int


# A model of 135M diverged at the rate that suits a single block.
BLOCK, MODEL = Schedule(1e-3, 0.0, 4), Schedule(1e-4, 2e-3, 2)

# Computes a batch, and how far the result is from the dense model's.
Loss = Callable[[], Tensor]


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, under: Weight4bit) -> Tensor:
        return encoded_under(w, under).dequantize(torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None


def _start(w: Tensor, w4: Weight4bit) -> Tensor:
    """Values that round to the codes of ``w4``, each as far from the decoded one towards ``w`` as its code allows."""
    decoded = w4.dequantize(torch.float32)
    found = decoded
    for share in (0.25, 0.5, 1.0):
        tried = decoded + share * (w.float() - decoded)
        found = torch.where(encoded_under(tried, w4).dequantize(torch.float32) == decoded, tried, found)
    return found


class _Learnt:
    """A weight that is learnt. While it is, its module multiplies by the rounded one.

    Attributes:
        moved: by how much each weight has moved, in units of the largest value of its block.
        factors: those of the low-rank term, [rank, K] and [N, rank].
    """

    def __init__(self, module: Any, w: Tensor, w4: Weight4bit, generator: torch.Generator) -> None:
        self._module, self.w4 = module, w4
        self._start = _start(w, w4)
        largest = max(map(abs, code_values(w4.code)))
        unit = w4.decoded_scales().float().abs().reshape(-1, 1) * largest
        self._unit = unit.expand(-1, w4.block_size).reshape(-1)[: w.numel()].view(w.shape)
        self.moved = torch.zeros_like(self._start).requires_grad_()
        rows, columns = w.shape
        # Drawn on the CPU, so that every device starts from the same values.
        drawn = torch.randn(_RANK, columns, generator=generator, dtype=torch.float32, device="cpu")
        first = drawn.to(w.device) / columns**0.5
        self.factors = first.requires_grad_(), first.new_zeros(rows, _RANK).requires_grad_()
        self._mean_unit = float(unit.mean())

    def _value(self) -> Tensor:
        first, second = self.factors
        return torch.addmm(self._start + self.moved * self._unit, second, first, alpha=self._mean_unit)

    def forward(self, x: Tensor) -> Tensor:
        rounded = _Rounded.apply(self._value(), self.w4)  # type: ignore[no-untyped-call]
        return nn.functional.linear(x, rounded.to(x.dtype), self._module.bias)

    def result(self) -> Weight4bit:
        return encoded_under(self._value().detach(), self.w4)


def _state(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The values of the parameters and what the optimizer knows of each, by number and name."""
    return {
        f"{i}/{name}": tensor
        for i, parameter in enumerate(parameters)
        for name, tensor in {"value": parameter.detach(), **optimizer.state.get(parameter, {})}.items()
    }


def _restore(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Continues from a ``_state``."""
    known: dict[int, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        number, name = key.split("/")
        if name == "value":
            parameters[int(number)].detach().copy_(tensor)
        else:
            known.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": known})


def learn(
    weights: dict[str, tuple[Any, Tensor, Weight4bit]],
    losses: Sequence[Loss],
    schedule: Schedule,
    on_step: Callable[[int, int], object],
    progress: Progress | None = None,
) -> dict[str, Weight4bit]:
    """Other codes for the weights of linear layers, with which the loss on the held-out batches is smaller.

    Of the codes after each pass over the text, those with the smallest loss are chosen.

    Args:
        weights: by name, each with its module, which is 4-bit, its dense values [N, K], and its 4-bit values.
        losses: of each batch.
        schedule: ``BLOCK`` or ``MODEL``.
        on_step: called with the number of a step, from 1 on, and the number of all steps.
        progress: keeps the state every ten minutes. Learning continues from the state that it has, with the same bits.

    Returns:
        The learnt weights; none if there are too few batches, or no learnt codes are better.
    """
    held_out = max(1, len(losses) // _HELD_OUT)
    train, test = losses[:-held_out], losses[-held_out:]
    if not train or not weights:
        return {}

    def tested() -> float:
        with torch.no_grad():
            return sum(loss().item() for loss in test)

    best: dict[str, Weight4bit] = {}
    generator = torch.Generator().manual_seed(0)
    learnt = {name: _Learnt(*weight, generator) for name, weight in weights.items()}
    moved = [one.moved for one in learnt.values()]
    factors = [factor for one in learnt.values() for factor in one.factors]
    parameters = [*moved, *factors]
    groups: list[dict[str, Any]] = [{"params": moved}, {"params": factors, "lr": schedule.low_rank_rate}]
    optimizer = torch.optim.Adam(groups, schedule.rate, betas=(0.9, 0.95))
    rates = [group["lr"] for group in optimizer.param_groups]
    steps = schedule.passes * len(train)
    for (module, *_), one in zip(weights.values(), learnt.values(), strict=True):
        module.forward = one.forward
    try:
        state = None if progress is None else progress.load()
        if state is None:
            done, least = 0, tested()
        else:
            done, least = int(state.pop("done")), float(state.pop("least"))
            for name in [key for key in state if key.startswith(_BEST)]:
                w4 = learnt[name.removeprefix(_BEST)].w4
                best[name.removeprefix(_BEST)] = w4.replace(packed=state.pop(name).to(w4.device))
            _restore(parameters, optimizer, state)
        saved = time.monotonic()
        for step in range(done, steps):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - step / steps)
            with torch.enable_grad():
                loss = train[step % len(train)]()
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                for tensor, gradient in zip(parameters, gradients, strict=True):
                    tensor.grad = gradient
            optimizer.step()
            if (step + 1) % len(train) == 0 and (now := tested()) < least:
                least, best = now, {name: one.result() for name, one in learnt.items()}
            if progress is not None and time.monotonic() - saved >= _SAVE_SECONDS:
                state = _state(parameters, optimizer) | {
                    _BEST + name: w4.tensors["packed"] for name, w4 in best.items()
                }
                state["done"] = torch.tensor(step + 1, dtype=torch.int64, device="cpu")
                state["least"] = torch.tensor(least, dtype=torch.float64, device="cpu")
                progress.save(state)
                saved = time.monotonic()
            on_step(step + 1, steps)
    finally:
        for module, *_ in weights.values():
            del module.forward
    return best
