"""Adapters that begin with what quantizing took away of the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._internal.svd import nearest_of_rank
from ..weight import Weight4bit
from .encoder import Feedback

_INITIAL = "_qlora_initial_lora"

# A [R, K] and B [N, R], float32: what an adapter of scaling 1 adds is B · A.
LowRank = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class InitLora:
    """How adapters begin that are to make good what quantizing took away, W - Ŵ.

    Attributes:
        method: "svd": the best of that rank for the outputs on the calibration's inputs X, the smallest
            ‖X · (W - Ŵ - B · A)ᵀ‖; "loftq": the best for the weights alone (LoftQ, Li et al., 2023).
        rank: of the adapters.
        iterations: of "loftq": how often weights and adapters are fitted to each other, in turns. More than one changes
            the 4-bit weights, which are the nearest to W - B · A then.

    Raises:
        ValueError: an attribute is none of these.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> init = qlora_ext.calibration.InitLora(method="loftq", rank=8)
        >>> model = qlora_ext.quantize_model(model, init_lora=init)
        >>> [a.shape for a, b in qlora_ext.calibration.initial_lora_of(model).values()]
        [torch.Size([8, 64])]
    """

    method: str = "svd"
    rank: int = 16
    iterations: int = 1

    def __post_init__(self) -> None:
        if self.method not in ("svd", "loftq"):
            raise ValueError(f"init_lora: expected 'svd' or 'loftq', got {self.method!r}")
        for name in ("rank", "iterations"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a number of 1 or more, got {value!r}")
        if self.method == "svd" and self.iterations > 1:
            raise ValueError(f"iterations: expected 1 with 'svd', got {self.iterations}")

    @classmethod
    def of(cls, value: Any) -> InitLora:
        """``value`` itself, or that method with the defaults."""
        return value if isinstance(value, InitLora) else cls(value)


def initial_lora_of(model: nn.Module) -> dict[str, LowRank]:
    """A and B of each layer by its name; empty where ``quantize_model`` was not asked for any.

    ``qlora_ext.integrations.peft.initialize_lora`` puts them into adapters.

    Example:
        >>> model = qlora_ext.quantize_model(nn.Sequential(nn.Linear(64, 32)), init_lora="loftq")
        >>> a, b = qlora_ext.calibration.initial_lora_of(model)["0"]
        >>> a.shape, b.shape
        (torch.Size([16, 64]), torch.Size([32, 16]))
    """
    return dict(getattr(model, _INITIAL, {}))


def keep_initial_lora(model: nn.Module) -> dict[str, LowRank]:
    """Where those of ``model`` are to be put: nothing is in it yet."""
    found: dict[str, LowRank] = {}
    vars(model)[_INITIAL] = found
    return found


def loftq(
    w: Tensor, plain: Weight4bit, quantize: Callable[[Tensor], Weight4bit], settings: InitLora
) -> tuple[Weight4bit, LowRank]:
    """LoftQ's 4-bit weight and adapter of ``w`` [N, K].

    Args:
        plain: ``w`` quantized. quantize: does the same with another such weight.
    """
    w4, exact = plain, w.detach().float()
    a, b = nearest_of_rank(exact - w4.dequantize(torch.float32), settings.rank)
    for _ in range(settings.iterations - 1):
        w4 = dataclasses.replace(quantize(exact - b @ a), dtype=plain.dtype)
        a, b = nearest_of_rank(exact - w4.dequantize(torch.float32), settings.rank)
    return w4, (a, b)


def weighted(w: Tensor, w4: Weight4bit, feedback: Feedback | None, settings: InitLora) -> LowRank:
    """The adapter of ``w`` [N, K] beside ``w4`` that is best for inputs of known second moments H = L · Lᵀ.

    ‖(W - Ŵ - B · A) · L‖ is smallest where B · A · L is the nearest of that rank to (W - Ŵ) · L. For L serves the
    inverse of feedback's factor, by which H is known in the order of rounding, or the root of the inputs' importance.
    """
    lost = w.detach().float() - w4.dequantize(torch.float32)
    if settings.method == "loftq" or feedback is None:
        return nearest_of_rank(lost, settings.rank)
    if feedback.factor is None:
        root = feedback.importance.sqrt()
        a, b = nearest_of_rank(lost * root, settings.rank)
        return a / root, b
    weighed = torch.linalg.solve_triangular(feedback.factor, lost[:, feedback.order], upper=True, left=False)
    ordered, b = nearest_of_rank(weighed, settings.rank)
    a = torch.empty_like(ordered)
    a[:, feedback.order] = ordered @ feedback.factor
    return a, b
