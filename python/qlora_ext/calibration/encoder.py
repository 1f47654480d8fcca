"""Encodes a weight for inputs with known second moments."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from ..weight import Weight4bit

# A failed factorization is tried again with ten times the damping, up to this many attempts.
_ATTEMPTS = 3


@dataclasses.dataclass(frozen=True)
class Feedback:
    """What error feedback (GPTQ) needs to know of a layer's inputs. Layers with the same inputs share it.

    Attributes:
        importance: float32 [K], the damped second moment of each input. It is never zero, so that the weights of a dead
            input still get sensible scales.
        order: int64 [K], the columns by falling second moment (GPTQ's ``act_order``).
        factor: float32 [K, K], the upper Cholesky factor of the inverse of the damped moments in that order; None if
            the factorization fails.
    """

    importance: Tensor
    order: Tensor
    factor: Tensor | None

    def __post_init__(self) -> None:
        """Rejects invalid importances, because the search for scales does not check them on CUDA.

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
        """From second moments.

        Args:
            moments: float32 [K, K], the mean or the sum of x xᵀ over tokens.
            damping: added to the diagonal, as a fraction of its mean.
            factorize: whether to compute ``factor``.

        Raises:
            ValueError: the moments are not finite, or all are zero.
        """
        diagonal = moments.diagonal()
        mean = diagonal.double().mean().item()
        if not (math.isfinite(mean) and mean > 0 and diagonal.isfinite().all()):
            raise ValueError(f"moments: expected finite second moments with a mean above zero, got a mean of {mean}")
        order = diagonal.argsort(descending=True, stable=True)
        # Scaled to a mean of one, so that products of tiny activations stay within float32's range.
        scaled = moments[order][:, order] / mean
        factor = None
        for attempt in range(_ATTEMPTS if factorize else 0):
            factor = _inverse_factor(scaled, damping * 10**attempt)
            if factor is not None:
                break
        return cls((diagonal / mean + damping).float(), order, factor)


def _inverse_factor(moments: Tensor, damping: float) -> Tensor | None:
    """The upper triangular U with Uᵀ · U = (moments + damping · I)⁻¹; None if the sum is not positive definite.

    U = R⁻¹, where R · Rᵀ = moments + damping · I with R upper triangular. R is the Cholesky factor of the matrix with
    rows and columns reversed.
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
    """A weight in 4 bits, and its error.

    Attributes:
        weight: the packed weight.
        method: "feedback", "scales" (weighted scales alone) or "absmax" (plain NF4).
        error: relative error of the outputs on the calibration's tokens, ‖X · (Ŵ - W)ᵀ‖ / ‖X · Wᵀ‖.
        absmax_error: the same for plain NF4.
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
    """Encodes ``w`` under the scales ``absmax``, in the form of ``plain``. Nested scales are quantized first."""
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
    """‖X · Wᵀ‖² per token, for inputs X with the second moments [K, K]."""
    return ((w @ moments) * w).double().sum().item()


def encode(w: Tensor, moments: Tensor, feedback: Feedback, plain: Weight4bit) -> Encoded:
    """The 4-bit encoding of ``w`` whose outputs have the smallest error on the calibration's inputs.

    The candidates are plain NF4, weighted scales, and, if ``feedback`` has a factor, weighted scales with GPTQ's error
    feedback.

    Args:
        w: [N, K]; float32, bfloat16 or float16.
        moments: float32 [K, K], the second moments of the layer's inputs.
        feedback: from those moments.
        plain: ``w`` as encoded by ``quantize_nf4``. The result has the same form.

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
    total = _energy(exact, moments)

    def error_of(w4: Weight4bit) -> float:
        lost = _energy(w4.dequantize(torch.float32) - exact, moments)
        return math.sqrt(max(lost, 0.0) / total) if total > 0 else 0.0

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
