"""Results of linear layers with ``activations="int8"`` by the oracle, and how far they may be from the exact ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from torch import Tensor

import accuracy
import forms
import reference
from accuracy import U32, Operand, given
from samples import LinearSample, linear_sample, rows

INT8 = "int8"
LEAST_DX_BLOCK = 32  # smaller blocks have an exact gradient
# The rounding of 127 / a and of the product with it, and that of the unit, in units: 3 · 127 · 2^-24 beside a half.
FACTOR = 1 + 2.0**-14
# Products of fractions are known to 1.5, and a unit is at least 4096 / 127 of them.
DX_FACTOR = FACTOR + 2 * 1.5 * 127 / 4096


@dataclasses.dataclass
class Int8Weight:
    """A weight [N, K] as the mode multiplies it.

    Attributes:
        c, per_one: the integers of its codes, of which ``per_one`` make one.
        scale, offset: of each element; the offset is 0 without one.
    """

    c: np.ndarray
    per_one: float
    scale: np.ndarray
    offset: np.ndarray
    block_size: int

    @classmethod
    def of(cls, s: LinearSample) -> Int8Weight:
        shape = s.w4.shape
        codes, scale, offset, _ = forms.parts(vars(s.w4), shape.numel())
        c, per_one = reference.int8_code(forms.code_values(s.w4.code))
        offset = np.zeros(shape) if offset is None else offset.reshape(shape).astype(np.float64)
        return cls(c[codes].reshape(shape), per_one, scale.reshape(shape), offset, s.w4.block_size)

    @property
    def values(self) -> np.ndarray:
        return self.scale.astype(np.float64) * self.c / self.per_one + self.offset

    def of_dx(self) -> Int8Weight:
        """The same weight as the gradient multiplies it: beside offsets, the integers lie around zero."""
        if not self.offset.any():
            return self
        middle = (int(self.c.min()) + int(self.c.max()) + 1) // 2
        offset = np.float32(self.offset) + np.float32(middle / self.per_one) * self.scale
        return dataclasses.replace(self, c=self.c - middle, offset=offset.astype(np.float64))

    @property
    def noise(self) -> np.ndarray:
        """What float32's sums add to the error of an offset, which may cancel most of a value."""
        return 2 * U32 * np.sqrt(accuracy.roundings(self.c.shape[1]) / 3) * np.abs(self.offset)

    def operand(self) -> Operand:
        """The values. Their error is that of the products of x with the scaled codes and with the offset."""
        error = U32 * (2 * np.abs(self.values) + 2 * accuracy.roundings(self.c.shape[1]) * np.abs(self.offset))
        return Operand(self.values, self.values, error, self.noise)


def _product(q: np.ndarray, units: np.ndarray) -> np.ndarray:
    return q.astype(np.float64) * units


def forward(s: LinearSample) -> accuracy.Expected:
    """y of the sample."""
    x, w = rows(s.x), Int8Weight.of(s)
    products = [(given(_product(*reference.round_to_int8(x))), w.operand().T, 1.0)]
    if s.lora_a is not None:
        lora_a, lora_b, scaling, dropout_p, seed = s.lora64()
        mask = reference.dropout_mask(x.shape, dropout_p, seed)
        products.append((accuracy.low_rank(x * mask, lora_a.T, scaling, s.x.dtype), given(lora_b.T), 1.0))
    return accuracy.sums(products, 0.0 if s.bias is None else s.bias64(), s.x.dtype)


def _column_groups(w: Int8Weight, dy: np.ndarray) -> list[tuple[slice, np.ndarray, np.ndarray]]:
    """The columns under one scale per row, and dy times that scale, as q and units."""
    width, (_, k) = min(64, w.block_size), w.c.shape
    groups = [slice(first, first + width) for first in range(0, k, width)]
    return [(g, *reference.round_products_to_int8(dy, w.scale[:, g.start])) for g in groups]


def dx(s: LinearSample, dy: Tensor) -> accuracy.Expected:
    """dx of the sample."""
    w, dy64 = Int8Weight.of(s).of_dx(), rows(dy)
    parts = []
    for columns, q, units in _column_groups(w, dy64):
        ones = w.c[:, columns] / w.per_one
        products = [(given(_product(q, units)), Operand(ones, ones, U32 * np.abs(ones)), 1.0)]
        offsets = w.offset[:, columns]
        products.append((given(dy64), Operand(offsets, offsets, None, w.noise[:, columns]), 1.0))
        if s.lora_a is not None:
            lora_a, lora_b, scaling, dropout_p, seed = s.lora64()
            mask = reference.dropout_mask((len(dy64), w.c.shape[1]), dropout_p, seed)[:, columns]
            products.append((accuracy.low_rank(dy64, lora_b, scaling, dy.dtype), given(lora_a[:, columns]), mask))
        parts.append(accuracy.sums(products, 0.0, dy.dtype))
    fields = dataclasses.fields(accuracy.Expected)
    return accuracy.Expected(*(np.concatenate([getattr(p, f.name) for p in parts], axis=1) for f in fields))


def forward_bound(s: LinearSample) -> np.ndarray:
    """[M, N]: how far y may be from the exact one, sums and the rounding of the result apart."""
    x, w = rows(s.x), Int8Weight.of(s)
    _, units = reference.round_to_int8(x)
    return FACTOR * units / 2 @ np.abs(w.values).T + np.abs(x) @ np.abs(w.values - s.decoded()).T


def dx_bound(s: LinearSample, dy: Tensor) -> np.ndarray:
    """[M, K]: the same of dx."""
    w, dy64 = Int8Weight.of(s).of_dx(), rows(dy)
    bound = np.abs(dy64) @ np.abs(w.values - s.decoded())
    for columns, _, units in _column_groups(w, dy64):
        bound[:, columns] += DX_FACTOR * units / 2 @ np.abs(w.c[:, columns] / w.per_one)
    return bound


def sample(form: str, m: int, n: int, k: int, rank: int | None = None, **more: Any) -> LinearSample:
    """A sample whose weight is a random one of that form."""
    s = linear_sample(m, n, k, rank, **more)
    return dataclasses.replace(s, w4=forms.random_weight(forms.FORMS[form], (n, k), dtype=s.x.dtype))
