"""Adds the update of an adapter to packed weights.

An adapter moves most weights by less than half a step between two codes. Rounding to the nearest code leaves such
weights unchanged, and the training is lost. With stochastic rounding the expected value is right: a fraction of the
weights takes the step, and the sums over a row hardly differ. The scales do not change, so a weight that does not move
keeps its code.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch
from torch import Tensor

from .._library import LIBRARY, cuda_error
from ..encoders import encoded
from ..formats import bits_of
from ..ops import MERGE_LORA_NF4
from ..weight import TENSORS, Weight4bit, operands, quantize

# If rounding to the nearest codes retains this share of an update, it is used. Stochastic rounding has larger errors.
RETAINED_BY_NEAREST = 0.95
# The same for ``encode_like``. At the end of training, the loss is flat along the update: losing 15% of the update
# costs about 2% of its gain. Stochastic rounding of a large update has a 1.5 times larger error.
_RETAINED = 0.85


def seed_of(name: str) -> int:
    """The seed for rounding the weight ``name`` of a model.

    Merging an adapter twice gives the same model. The rounding errors of different weights are independent.
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)


def with_update(w4: Weight4bit, moved: Tensor, seed: int = 0) -> Weight4bit:
    """Encodes ``moved``, the sum of W and an adapter's update, under the scales and offsets of W.

    The codes are rounded stochastically. The result is deterministic.

    Args:
        w4: W, [N, K] or a stack of such matrices [E, N, K].
        moved: float32, the same shape.
        seed: of the random numbers, from ``seed_of``. Matrix e of a stack uses ``seed_of(f"{seed}.{e}")``.

    Raises:
        ValueError: the shapes of ``moved`` and ``w4`` differ.
    """
    return _under_scales_of(w4, moved, seed)


def with_nearest_codes(w4: Weight4bit, moved: Tensor) -> Weight4bit:
    """Encodes ``moved`` under the scales and offsets of W to the nearest codes; see ``with_update``."""
    return _under_scales_of(w4, moved, None)


def _under_scales_of(w4: Weight4bit, moved: Tensor, seed: int | None) -> Weight4bit:
    """See ``with_update``. Without a seed, it rounds to the nearest codes."""
    if moved.shape != w4.shape:
        raise ValueError(f"moved: expected shape {list(w4.shape)}, that of w4, got {list(moved.shape)}")
    if moved.ndim == 3:
        seeds = (None if seed is None else seed_of(f"{seed}.{e}") for e in range(len(moved)))
        return Weight4bit.stack([_under_scales_of(w4.matrix(e), moved[e], own) for e, own in enumerate(seeds)])
    scales = w4.decoded_scales()
    return w4.replace(packed=encoded(w4.without_offsets(moved, scales), scales, w4.form, seed))


def retained_update(update: Tensor, before: Tensor, after: Tensor) -> tuple[float, float]:
    """⟨after - before, update⟩ and ‖update‖². Their quotient is the share of the update that the weights retain."""
    return ((after - before) * update).sum().item(), update.square().sum().item()


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A weight with an update.

    Attributes:
        w4: the weight.
        retained, total: as in ``retained_update``, where the weight before is in the same form.
    """

    w4: Weight4bit
    retained: float
    total: float


def encode_like(base: Weight4bit, before: Tensor, moved: Tensor, seed: int = 0) -> Encoded:
    """Encodes ``moved``, the sum of W and an adapter's update, in the form of ``base``.

    Of three roundings, the result is the one with the smallest error among those that retain the update:

    - to the nearest codes under the scales of ``base``, which loses a small update if W lies on the codes;
    - to the nearest codes under new scales, for updates that exceed the old ones;
    - the update added to the values of ``base``, and rounded stochastically under its scales.

    Args:
        base: W, rounded to the nearest codes of that form.
        before: W, float32 [N, K].
        moved: float32, the same shape.
        seed: of the stochastic rounding, from ``seed_of``.
    """
    old, update = base.dequantize(torch.float32), moved - before
    found: list[tuple[float, Encoded]] = []
    for w4 in (with_update(base, old + update, seed), with_nearest_codes(base, moved), quantize(moved, base.form)):
        values = w4.dequantize(torch.float32)
        encoded = Encoded(w4, *retained_update(update, old, values))
        if not found or abs(encoded.retained - encoded.total) <= (1 - _RETAINED) * encoded.total:
            found.append(((values - moved).norm().item(), encoded))
    return min(found, key=lambda candidate: candidate[0])[1]


@torch.no_grad()
def merged_weight(w4: Weight4bit, lora_a: Tensor, lora_b: Tensor, scaling: float, seed: int = 0) -> Weight4bit:
    """W + scaling · B · A in the form of W, summed in float32 and encoded by ``with_update``; also of stacks."""
    if len(w4.shape) == 3:
        matrices = ((w4.matrix(e), lora_a[e], lora_b[e], seed_of(f"{seed}.{e}")) for e in range(len(lora_a)))
        return Weight4bit.stack([merged_weight(w, a, b, scaling, own) for w, a, b, own in matrices])
    if bits_of(w4.code) > 4:
        return with_update(w4, _updated(w4, lora_a.float(), lora_b.float(), scaling), seed)
    if w4.column_order is not None:
        lora_a = lora_a.index_select(-1, w4.column_order)
    arguments = operands(w4, w4, lora_a.float(), lora_b.float(), scaling, seed)
    return w4.replace(packed=torch.ops.qlora.merge_lora_nf4(*arguments))


def _updated(w4: Weight4bit, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """W + scaling · B · A, float32."""
    return w4.dequantize(torch.float32).addmm_(lora_b, lora_a, alpha=scaling)


def _merge_on_cuda(*args: Any) -> Tensor:
    """``merge_lora_nf4`` on CUDA, where it is a sequence of other operators."""
    a = MERGE_LORA_NF4(*args)
    # Of a weight with a column order, the adapter is in that order already.
    tensors = {name: getattr(a, name) for name in TENSORS if name != "column_order"}
    form = {name: getattr(a, name) for name in ("block_size", "nested_block_size", "code")}
    shape = torch.Size((a.lora_b.shape[0], a.lora_a.shape[1]))
    w4 = Weight4bit(**tensors, **form, shape=shape, dtype=torch.float32)
    return with_update(w4, _updated(w4, a.lora_a, a.lora_b, a.scaling), a.seed).packed


if cuda_error is None:
    LIBRARY.impl("merge_lora_nf4", _merge_on_cuda, "CUDA")
