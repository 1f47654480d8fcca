"""Initial adapters that approximate the quantization error of the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._internal.svd import low_rank_approximation
from ..weight import Weight4bit
from .weighted_encoding import Feedback

_INITIAL = "_qlora_initial_lora"

# A [R, K] and B [N, R], float32. An adapter with scaling 1 adds B · A to the weight.
LowRank = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class InitLora:
    """How to compute initial adapters B · A that approximate the quantization error W - Ŵ.

    Attributes:
        method: "svd" minimizes ‖X · (W - Ŵ - B · A)ᵀ‖ for the calibration's inputs X. "loftq" minimizes
            ‖W - Ŵ - B · A‖ (LoftQ, Li et al., 2023).
        rank: of the adapters.
        iterations: for "loftq", the number of alternating fits of weight and adapter. With more than one, the 4-bit
            weight is the quantized W - B · A.

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
        """``value`` itself if it is an ``InitLora``, else the method of that name with defaults."""
        return value if isinstance(value, InitLora) else cls(value)


def initial_lora_of(model: nn.Module) -> dict[str, LowRank]:
    """The initial A [R, K] and B [N, R] of each layer, by name; empty if ``quantize_model`` got no ``init_lora``.

    ``qlora_ext.integrations.peft.initialize_lora`` puts them into adapters.

    Example:
        >>> model = qlora_ext.quantize_model(nn.Sequential(nn.Linear(64, 32)), init_lora="loftq")
        >>> a, b = qlora_ext.calibration.initial_lora_of(model)["0"]
        >>> a.shape, b.shape
        (torch.Size([16, 64]), torch.Size([32, 16]))
    """
    return dict(getattr(model, _INITIAL, {}))


def keep_initial_lora(model: nn.Module) -> dict[str, LowRank]:
    """Attaches an empty table of initial adapters to ``model``, and returns it to be filled."""
    found: dict[str, LowRank] = {}
    vars(model)[_INITIAL] = found
    return found


def loftq(
    w: Tensor, plain: Weight4bit, quantize: Callable[[Tensor], Weight4bit], settings: InitLora
) -> tuple[Weight4bit, LowRank]:
    """The 4-bit weight and the adapter that LoftQ computes for ``w`` [N, K].

    Args:
        plain: ``w`` quantized.
        quantize: quantizes another weight of this shape in the same way.
    """
    w4, exact = plain, w.detach().float()
    a, b = low_rank_approximation(exact - w4.dequantize(torch.float32), settings.rank)
    for _ in range(settings.iterations - 1):
        w4 = quantize(exact - b @ a).replace(dtype=plain.dtype)
        a, b = low_rank_approximation(exact - w4.dequantize(torch.float32), settings.rank)
    return w4, (a, b)


def weighted(w: Tensor, w4: Weight4bit, feedback: Feedback | None, settings: InitLora) -> LowRank:
    """The best adapter for the error of ``w4`` as an encoding of ``w`` [N, K], given second moments H = L · Lᵀ.

    ‖(W - Ŵ - B · A) · L‖ is minimal if B · A · L is the best low-rank approximation of (W - Ŵ) · L. L is the inverse of
    the factor in ``feedback`` (in the order of rounding), or, without a factor, the root of the inputs' importance.
    """
    lost = w.detach().float() - w4.dequantize(torch.float32)
    if settings.method == "loftq" or feedback is None:
        return low_rank_approximation(lost, settings.rank)
    if feedback.factor is None:
        root = feedback.importance.sqrt()
        a, b = low_rank_approximation(lost * root, settings.rank)
        return a / root, b
    weighted_error = torch.linalg.solve_triangular(feedback.factor, lost[:, feedback.order], upper=True, left=False)
    ordered, b = low_rank_approximation(weighted_error, settings.rank)
    a = torch.empty_like(ordered)
    a[:, feedback.order] = ordered @ feedback.factor
    return a, b
