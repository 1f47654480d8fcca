"""Encodes a weight for inputs with known second moments."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ..formats import NESTED_TABLE8, code_values
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
        method: "feedback", "scales" (weighted scales alone) or "absmax" (plain: by the form's own recipe).
        error: relative error of the outputs on the calibration's tokens, ‖X · (Ŵ - W)ᵀ‖ / ‖X · Wᵀ‖.
        absmax_error: the same for the plain weight.
    """

    weight: Weight4bit
    method: str
    error: float
    absmax_error: float


# The steps between the codes of a table that are tried around the plain one: of E4M3, from 0.6 to 1.25 times its value.
_TABLE_STEPS = (-5, -4, -3, -2, -1, 1, 2)


def _with_scales(scales: Tensor, plain: Weight4bit) -> Weight4bit:
    """``plain`` with other scales, in its form; its codes stay."""
    if not plain.double_quant:
        return plain.replace(absmax=scales.to(plain.absmax.dtype))
    codes, nested_absmax, nested_offset = torch.ops.qlora.quantize_absmax(scales, plain.nested_block_size)
    return plain.replace(absmax=codes, nested_absmax=nested_absmax, nested_offset=nested_offset)


def _with_codes(step: int, plain: Weight4bit) -> Weight4bit:
    """``plain`` with the code of each scale moved by ``step``, if the table is ascending there; its own codes stay."""
    assert plain.scale_table is not None
    old = plain.absmax.long()
    new = (old + step).clamp(0, 255)
    before, after = plain.scale_table[old], plain.scale_table[new]
    ascends = (after - before) * step > 0  # not where a table of floats ends, at NaN or at its negative half
    found = torch.where(ascends & after.isfinite() & (after > 0), new, old)
    return plain.replace(absmax=found.to(torch.uint8))


def encoded_under(w: Tensor, under: Weight4bit, feedback: Feedback | None = None) -> Weight4bit:
    """``w`` encoded under the scales and offsets of ``under``."""
    scales = under.decoded_scales()
    given = (None, None) if feedback is None else (feedback.factor, feedback.order)
    scaled = under.without_offsets(w, scales).contiguous()
    packed = torch.ops.qlora.encode_nf4(scaled, scales, under.block_size, *given, under.code)
    return under.replace(packed=packed)


def _searched(w: Tensor, importance: Tensor, plain: Weight4bit) -> Weight4bit | None:
    """``plain`` with the scales that have the least weighted error; None if those of its form cannot be searched.

    A code that reaches farther on one side may have negative scales, which mirror it. The scales of a table are
    searched among the codes near those of ``plain``.
    """
    form, values = plain.form, code_values(plain.code)
    if form.offsets is not None or form.scales == NESTED_TABLE8:
        return None
    if form.has_table:
        return _best([plain, *(_with_codes(step, plain) for step in _TABLE_STEPS)], w, importance)
    scales = torch.ops.qlora.search_absmax_nf4(w, importance, plain.block_size, plain.code)
    found = _with_scales(scales, plain)
    if form.double_quant or max(values) == -min(values):  # the scales of double quantization have one sign
        return found
    mirrored = torch.ops.qlora.search_absmax_nf4(-w, importance, plain.block_size, plain.code)
    return _best([found, _with_scales(-mirrored, plain)], w, importance)


def _best(candidates: list[Weight4bit], w: Tensor, importance: Tensor) -> Weight4bit:
    """A weight with the scale of each block from the candidate under which the block has the least weighted error."""
    exact, size = w.float(), candidates[0].block_size
    absmax = candidates[0].absmax
    least = torch.full(absmax.shape, torch.inf, dtype=torch.float32, device=w.device)
    for candidate in candidates:
        errors = (encoded_under(w, candidate).dequantize(torch.float32) - exact).square() * importance
        padded = torch.nn.functional.pad(errors.view(-1), (0, -errors.numel() % size))
        error = padded.view(-1, size).sum(1)
        absmax = torch.where(error < least, candidate.absmax, absmax)
        least = torch.minimum(least, error)
    return candidates[0].replace(absmax=absmax)


def _energy(w: Tensor, moments: Tensor) -> float:
    """‖X · Wᵀ‖² per token, for inputs X with the second moments [K, K]."""
    return ((w @ moments) * w).double().sum().item()


def encode(w: Tensor, moments: Tensor, feedback: Feedback, plain: Weight4bit) -> Encoded:
    """The 4-bit encoding of ``w`` whose outputs have the smallest error on the calibration's inputs.

    The candidates are ``plain``, weighted scales, and, if ``feedback`` has a factor, weighted scales with GPTQ's error
    feedback. Forms with offsets keep the scales and offsets of ``plain``.

    Args:
        w: [N, K]; float32, bfloat16 or float16.
        moments: float32 [K, K], the second moments of the layer's inputs.
        feedback: from those moments.
        plain: ``w`` as encoded by ``qlora_ext.quantize``. The result has the same form.

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
    searched = _searched(w, feedback.importance, plain)
    attempts: list[tuple[str, Feedback | None]] = [] if searched is None else [("scales", None)]
    if feedback.factor is not None:
        attempts.append(("feedback", feedback))
    for method, given in attempts:
        w4 = encoded_under(w, plain if searched is None else searched, given)
        error = error_of(w4)
        if error < best.error:
            best = Encoded(w4, method, error, absmax_error)
    return best
