"""Error bounds of results, computed from the operands alone and therefore the same on every processor.

Numerics of the design: a weight is rounded once to the compute dtype (unit roundoff u, smallest subnormal s), and so
are the low-rank products h and g, and the result. Sums are in float32, in any order. Two rules follow.

Every entry. The rounding error of v is at most max(u |v|, s / 2), and 0 if v is 0. Therefore

    |out - exact| <= the roundings of w, times |x|  +  those of h, times |b|
                     + roundings(n) 2^-24 (sum |x| |w| + sum |h| |b| + |bias|)  +  the rounding of the result

for n terms, where roundings(n) is the maximum number of roundings that a term goes through, its product included. In
one long chain this is n. But sums are divided into pieces of 32 to 64 terms (a quantization block, a stage of CUDA's
shared memory), whose results are added: roundings(n) = 64 + n / 32.

Norms. `formula` has the roundings of w, h and the result, with exact sums, so its error depends on the operands alone.
The error of float32's additions is added: each rounding is at most 2^-24 / sqrt(3) (root mean square) of a partial
sum, whose square is at most the sum of the squared terms and of the squared result:

    |out - exact|^2 <= (1.05 |formula - exact|)^2 + |noise|^2,
    noise^2 = roundings(n) / 3 2^-48 (sum (x w)^2 + ... + exact^2)

for every token, for every output over the tokens, and for all entries. Results of the same quality differ by chance:
the left side may exceed the right side by CHANCE standard deviations of their difference, which is a sum over entries.
(This needs at least CHANCE^2 entries; over 256 entries of similar size it detects 1.2 times the formula's error, over
10^4 entries 1.06 times.) A few large entries may dominate a norm. Each norm is therefore taken twice: of the errors,
and of the errors divided by the bounds of their entries, which gives all entries the same weight.

On the CPU, 16-bit types may be multiplied as integers, in steps of the largest x (docs/security.md).
This may add forward_steps or dx_steps to the error of an entry, only if a row of weights is nonzero exactly where x is
small.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import reference

MARGIN = 1.05
CHANCE = 3.0  # standard deviations
U32 = 2.0**-24
TINY32 = 2.0**-150  # half of the smallest float32 subnormal


def rounded(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """``v`` rounded once to dtype, as float64."""
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.asarray(x, np.float32)).to(dtype).double().numpy()


def rounding(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The maximum rounding error of entries of these magnitudes in dtype."""
    info = torch.finfo(dtype)
    u, s = info.eps / 2, info.smallest_normal * info.eps
    return np.where(x == 0, 0.0, np.maximum(u * np.abs(x), s / 2))


@dataclasses.dataclass
class Expected:
    """float64 [rows, columns]: the exact result, the formula's result, the bound of each error, float32's noise."""

    exact: np.ndarray
    formula: np.ndarray
    bound: np.ndarray
    noise: np.ndarray

    def with_steps(self, steps: np.ndarray) -> Expected:
        """The bounds for products of integers, with the maximum error of rounding their factors to fixed steps."""
        return dataclasses.replace(self, bound=self.bound + steps, noise=self.noise + steps)

    def rows(self, part: slice) -> Expected:
        return Expected(self.exact[part], self.formula[part], self.bound[part], self.noise[part])

    def failures(self, out: Tensor | np.ndarray) -> list[str]:
        """The rules that `out` breaks, as sentences with figures."""
        got = out.detach().cpu().double().numpy() if isinstance(out, Tensor) else out
        got = got.reshape(self.exact.shape)
        with np.errstate(invalid="ignore"):
            error = np.abs(got - self.exact)
        error[~np.isfinite(error)] = np.inf
        found = []
        wrong = error > self.bound
        if wrong.any():
            ratio = error / np.maximum(self.bound, 1e-300)
            i, j = np.unravel_index(np.argmax(ratio), ratio.shape)
            found.append(
                f"{wrong.sum()} of {wrong.size} entries exceed their bound, the worst [{i}, {j}]: "
                f"{got[i, j]:.6g}, exact {self.exact[i, j]:.6g}, bound {self.bound[i, j]:.3g}, {ratio[i, j]:.3g} times"
            )
        own = np.where(self.bound > 0, self.bound, 1.0)
        for how, scale in (("", np.max(own, initial=1e-300)), (" (each by its bound)", own)):
            of, formula, noise = (np.square(e / scale) for e in (error, self.formula - self.exact, self.noise))
            of = np.minimum(of, 1e100)  # infinity is among the entries that exceed their bound
            excess = of - MARGIN**2 * formula - noise
            for what, axis in (("rows", 1), ("columns", 0), ("all", None)):
                failed = np.sum(excess, axis) > CHANCE * np.sqrt(np.sum(np.square(excess), axis))
                if failed.any():
                    ratio = np.sqrt(np.sum(of, axis) / np.maximum(np.sum(formula + noise, axis), 1e-300))
                    found.append(
                        f"{failed.sum()} of {failed.size} {what}{how} exceed {MARGIN} times the formula's error, "
                        f"the worst [{np.argmax(np.where(failed, ratio, 0))}]: {np.max(ratio[failed]):.4g} times"
                    )
        return found


def roundings(n: int) -> float:
    return min(n, 64 + n / 32)


@dataclasses.dataclass
class Operand:
    """An operand of a product: its exact value, the formula's rounding, its error bound, float32's noise in it."""

    exact: np.ndarray
    formula: np.ndarray
    error: np.ndarray | None = None
    noise: np.ndarray | None = None

    @property
    def T(self) -> Operand:
        return Operand(*(None if a is None else a.T for a in (self.exact, self.formula, self.error, self.noise)))


def given(x: np.ndarray) -> Operand:
    return Operand(x, x)


def weight(w: np.ndarray, dtype: torch.dtype) -> Operand:
    """A decoded weight. In float32, its rounding is that of code times absmax, possibly applied to a sum instead."""
    return Operand(w, rounded(w, dtype), rounding(w, dtype))


def low_rank(x: np.ndarray, a: np.ndarray, scaling: float, dtype: torch.dtype) -> Operand:
    """scaling x a (h or g), rounded once."""
    h = sums([(given(x), given(scaling * a), 1.0)], 0.0, dtype)
    return Operand(h.exact, h.formula, h.bound, h.noise)


def sums(products: list[tuple[Operand, Operand, np.ndarray | float]], added: np.ndarray | float, dtype) -> Expected:
    """The sum of mask * (a @ b) over the products (a, b, mask), plus the addend, rounded once to dtype."""
    shape = products[0][0].exact.shape[0], products[0][1].exact.shape[1]
    exact, formula, magnitude, off, squares, noise = (np.zeros(shape) for _ in range(6))
    terms = 3  # the addend, the scaling, the mask
    for a, b, mask in products:
        size_a, size_b = np.abs(a.exact), np.abs(b.exact)
        terms += size_b.shape[0]
        exact += mask * (a.exact @ b.exact)
        formula += mask * (a.formula @ b.formula)
        magnitude += mask * (size_a @ size_b)
        squares += mask**2 * (size_a**2 @ size_b**2)
        if a.error is not None:
            off += mask * (a.error @ size_b)
        if b.error is not None:
            off += mask * (size_a @ b.error)
        if a.noise is not None:
            noise += mask**2 * (a.noise**2 @ size_b**2)
        if b.noise is not None:
            noise += mask**2 * (size_a**2 @ b.noise**2)
    exact, formula, magnitude = exact + added, formula + added, magnitude + np.abs(added)
    squares += np.square(added) + exact**2
    before = off + roundings(terms) * U32 * magnitude + (magnitude > 0) * terms * TINY32
    return Expected(
        exact,
        rounded(formula, dtype),
        before + rounding(np.abs(exact) + before, dtype),
        np.sqrt(noise + roundings(terms) / 3 * U32**2 * squares) + (magnitude > 0) * terms * TINY32,
    )


def forward(x, w, bias, lora_a, lora_b, scaling, dropout_p, seed, dtype: torch.dtype) -> Expected:
    """y of float64 x [M, K] and the decoded float64 w [N, K]."""
    products = [(given(x), weight(w, dtype).T, 1.0)]
    if lora_a is not None:
        mask = reference.dropout_mask(x.shape, dropout_p, seed)
        products.append((low_rank(x * mask, lora_a.T, scaling, dtype), given(lora_b.T), 1.0))
    return sums(products, 0.0 if bias is None else bias, dtype)


def dx(dy, w, lora_a, lora_b, scaling, dropout_p, seed, dtype: torch.dtype) -> Expected:
    """dx of float64 dy [M, N]."""
    products = [(given(dy), weight(w, dtype), 1.0)]
    if lora_a is not None:
        mask = reference.dropout_mask((dy.shape[0], w.shape[1]), dropout_p, seed)
        products.append((low_rank(dy, lora_b, scaling, dtype), given(lora_a), mask))
    return sums(products, 0.0, dtype)


def forward_steps(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """[M, N]: the maximum error of an entry of y from rounding x to steps of its largest value over 32639."""
    return 2.0**-16 * 1.005 * np.abs(x).max(axis=1, keepdims=True) * np.abs(w).sum(axis=1)


def dx_steps(dy: np.ndarray, w: np.ndarray) -> np.ndarray:
    """[M, K]: the maximum error of an entry of dx from rounding dy times scale to steps of its maximum over 16383.

    A code is w over its scale: at most 1, and 0 if w is 0. The bound of double-quantized scales may be twice the
    largest scale.
    """
    largest = np.abs(dy).max(axis=1, keepdims=True) * np.abs(w).max()
    return 2.0**-14 * 1.001 * largest * (w != 0).sum(axis=0)


def dlora(dy, x, lora_a, lora_b, scaling, dropout_p, seed, dtype: torch.dtype) -> tuple[Expected, Expected]:
    """da [R, K] and db [N, R]."""
    dropped = x * reference.dropout_mask(x.shape, dropout_p, seed)
    g, h = low_rank(dy, lora_b, scaling, dtype), low_rank(dropped, lora_a.T, scaling, dtype)
    return sums([(g.T, given(dropped), 1.0)], 0.0, dtype), sums([(given(dy.T), h, 1.0)], 0.0, dtype)


def total(x: np.ndarray, dtype: torch.dtype) -> Expected:
    """The problem of the sum over the rows, [1, columns]."""
    return sums([(given(np.ones((1, len(x)))), given(x), 1.0)], 0.0, dtype)


def concatenate(parts: Sequence[Expected]) -> Expected:
    """The concatenation of problems by rows."""
    return Expected(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Expected)))


def assert_accurate(out: Tensor | np.ndarray, expected: Expected) -> None:
    failures = expected.failures(out)
    assert not failures, "; ".join(failures)
