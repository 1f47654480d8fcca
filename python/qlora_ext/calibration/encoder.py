"""A weight's scales and codes for inputs of known second moments."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from ..weight import Weight4bit

# Damping is raised tenfold, at most so often, where a factorization fails.
_ATTEMPTS = 3


@dataclasses.dataclass(frozen=True)
class Feedback:
    """What error feedback needs of a layer's inputs; the same for all layers that read the same inputs.

    Attributes:
        importance: float32 [K], the damped second moment of each input: never zero, so that a dead input's weights
            still get sensible scales.
        order: int64 [K], the columns by falling second moment (GPTQ's ``act_order``).
        factor: float32 [K, K], the upper Cholesky factor of the inverse of the damped moments in that order; None where
            they have none, however damped.
    """

    importance: Tensor
    order: Tensor
    factor: Tensor | None

    def __post_init__(self) -> None:
        """Rejects invalid importances: on CUDA the search for scales does not check them.

        Raises:
            ValueError: an importance is negative, infinite or NaN.
        """
        wrong = ~((self.importance >= 0) & self.importance.isfinite())
        if wrong.any():
            column = int(wrong.nonzero()[0])
            value = self.importance[column].item()
            raise ValueError(f"importance: expected finite values of 0 or more, got {value:g} in column {column}")

    @classmethod
    def of(cls, moments: Tensor, damping: float = 0.01, factorize: bool = True) -> Feedback:
        """From the second moments [K, K] (float32, the mean of x xᵀ over tokens, or their sum).

        Args:
            moments: symmetric; of inputs that are always zero, rows and columns are zero.
            damping: of the moments' mean, what is added to each one's own.
            factorize: whether feedback is wanted; without, the factor is None and no time is spent on it.

        Raises:
            ValueError: the moments are not finite, or all zero: nothing is known of the inputs.
        """
        diagonal = moments.diagonal()
        mean = diagonal.double().mean().item()
        if not (math.isfinite(mean) and mean > 0 and diagonal.isfinite().all()):
            raise ValueError(f"moments: expected finite second moments with a mean above zero, got a mean of {mean}")
        order = diagonal.argsort(descending=True, stable=True)
        # Scaled to a mean of one: products of tiny activations stay in float32's range.
        scaled = moments[order][:, order] / mean
        factor = None
        for attempt in range(_ATTEMPTS if factorize else 0):
            factor = _inverse_factor(scaled, damping * 10**attempt)
            if factor is not None:
                break
        return cls((diagonal / mean + damping).float(), order, factor)


def _inverse_factor(moments: Tensor, damping: float) -> Tensor | None:
    """U, upper triangular, with Uᵀ · U = (moments + damping · 1)⁻¹; None where they are not positive definite.

    moments = R · Rᵀ with R upper is the Cholesky decomposition read from the last row to the first, and U = R⁻¹.
    """
    damped = moments.flip(0, 1)
    damped.diagonal().add_(damping)
    lower, info = torch.linalg.cholesky_ex(damped)
    if info.item():
        return None
    inverse = torch.linalg.solve_triangular(
        lower, torch.eye(len(lower), dtype=lower.dtype, device=lower.device), upper=False
    )
    factor = inverse.flip(0, 1).contiguous()
    return factor if factor.isfinite().all() else None


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A weight in 4 bits, and what it costs.

    Attributes:
        weight: the packed weight.
        method: "feedback", "scales" (weighted scales alone) or "absmax".
        error: of the outputs on the calibration's tokens, ‖X · (Ŵ - W)ᵀ‖ / ‖X · Wᵀ‖.
        absmax_error: the same of plain NF4.
    """

    weight: Weight4bit
    method: str
    error: float
    absmax_error: float


def _double_quantized(absmax: Tensor, nested_block_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, nested_absmax, nested_offset = torch.ops.qlora.quantize_absmax(absmax, nested_block_size)
    decoded: Tensor = torch.ops.qlora.dequantize_absmax(codes, nested_absmax, nested_offset, nested_block_size)
    return codes, nested_absmax, nested_offset, decoded


def _under_scales(w: Tensor, absmax: Tensor, plain: Weight4bit, feedback: Feedback | None) -> Weight4bit:
    """``w`` encoded under the scales ``absmax`` in the form of ``plain``: as they decode, double quantized."""
    parts: dict[str, Any] = {"absmax": absmax}
    if plain.double_quant:
        codes, nested_absmax, nested_offset, absmax = _double_quantized(absmax, plain.nested_block_size)
        parts = {"absmax": codes, "nested_absmax": nested_absmax, "nested_offset": nested_offset}
    if feedback is None:
        packed = torch.ops.qlora.encode_nf4(w, absmax, plain.block_size, code=plain.code)
    else:
        packed = torch.ops.qlora.encode_nf4(w, absmax, plain.block_size, feedback.factor, feedback.order, plain.code)
    return dataclasses.replace(plain, packed=packed, **parts)


def _energy(w: Tensor, moments: Tensor) -> float:
    """‖X · Wᵀ‖² a token, for inputs X of the second moments [K, K]."""
    return ((w @ moments) * w).double().sum().item()


def encode(w: Tensor, moments: Tensor, feedback: Feedback, plain: Weight4bit) -> Encoded:
    """The 4-bit weight [N, K] whose outputs on the calibration's inputs come nearest to those of ``w``.

    Weighted scales, then error feedback where ``feedback`` has a factor. What does worse than plain NF4 on the very
    inputs it was made for is not kept.

    Args:
        w: [N, K]; float32, bfloat16 or float16.
        moments: float32 [K, K], the second moments of the layer's inputs.
        feedback: of those moments.
        plain: ``w`` as ``quantize_nf4`` encodes it, in the form that is wanted.

    Example:
        >>> w, x = torch.randn(32, 64), torch.randn(500, 64) @ torch.randn(64, 64)
        >>> moments = x.T @ x / len(x)
        >>> feedback = qlora_ext.calibration.Feedback.of(moments)
        >>> found = qlora_ext.calibration.encode(w, moments, feedback, qlora_ext.quantize_nf4(w))
        >>> found.method, found.error < found.absmax_error
        ('feedback', True)
    """
    w = w.detach().contiguous()
    exact = w.float()
    whole = _energy(exact, moments)

    def error_of(w4: Weight4bit) -> float:
        lost = _energy(w4.dequantize(torch.float32) - exact, moments)
        return math.sqrt(max(lost, 0.0) / whole) if whole > 0 else 0.0

    absmax_error = error_of(plain)
    best = Encoded(plain, "absmax", absmax_error, absmax_error)
    absmax = torch.ops.qlora.search_absmax_nf4(w, feedback.importance, plain.block_size, plain.code)
    attempts: list[tuple[str, Feedback | None]] = [("scales", None)]
    if feedback.factor is not None:
        attempts.append(("feedback", feedback))
    for method, given in attempts:
        w4 = _under_scales(w, absmax, plain, given)
        error = error_of(w4)
        if error < best.error:
            best = Encoded(w4, method, error, absmax_error)
    return best
