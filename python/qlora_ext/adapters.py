"""Several adapters in one call of ``linear_nf4`` or ``grouped_linear_nf4``: the operators take them as stacks.

::

    lora_a   [ adapter 0 | adapter 1 |  ..  ]   [sum of ranks, K]
    lora_b   [ adapter 0 | adapter 1 |  ..  ]   [N, sum of ranks], adapters side by side
               ^0          ^rank_offsets[1]

Each row of x uses the adapter that ``adapter_of_row`` names, or none (-1). For experts, there are such stacks for each
expert: lora_a [E, sum of ranks, K] and lora_b [E, N, sum of ranks].
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class StackedAdapters(NamedTuple):
    """The adapters of one layer as ``torch.ops.qlora.linear_nf4`` takes them; ``stack_adapters`` makes it.

    Attributes:
        lora_a, lora_b: [sum of ranks, K] and [N, sum of ranks]; for experts [E, sum of ranks, K] and
            [E, N, sum of ranks].
        rank_offsets: int32 [adapters + 1]. Adapter i has rows (columns of lora_b) rank_offsets[i] ..
            rank_offsets[i + 1].
        scalings: float64 [adapters].
        max_rank: the largest rank.
        seeds: of dropout, int64 [adapters]; None if all adapters use the seed of the call.
    """

    lora_a: Tensor
    lora_b: Tensor
    rank_offsets: Tensor
    scalings: Tensor
    max_rank: int
    seeds: Tensor | None = None

    def arguments(self, adapter_of_row: Tensor | None) -> tuple[Any, ...]:
        """The operator's last arguments, which describe several adapters."""
        return adapter_of_row, self.rank_offsets, self.scalings, self.seeds, self.max_rank


def _list(name: str, values: object, count: int) -> Sequence[Any]:
    if not isinstance(values, Sequence) or len(values) != count:
        raise ValueError(f"{name}: expected a list of {count}, one per adapter of lora_a, got {reprlib.repr(values)}")
    return values


def stack_adapters(
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: float | Sequence[float] = 1.0,
    seeds: Sequence[int] | None = None,
) -> StackedAdapters:
    """Stacks the adapters of one layer. For many calls with the same adapters, stack once: it copies all of them.

    Args:
        lora_a, lora_b: [R, K] and [N, R] for each adapter, or for those of experts [E, R, K] and [E, N, R]. Ranks may
            differ, and may be 0. Gradients reach all of them.
        scaling: of each adapter, or of all.
        seeds: of dropout, one per adapter. None: all use the seed of the call.

    Raises:
        TypeError, ValueError: the message names the argument, the adapter and what was expected.

    Example:
        >>> from qlora_ext.adapters import stack_adapters
        >>> w4, x = qlora_ext.quantize_nf4(torch.randn(48, 64)), torch.randn(3, 64)
        >>> a, b = [torch.randn(8, 64), torch.randn(4, 64)], [torch.randn(48, 8), torch.randn(48, 4)]
        >>> stacked = stack_adapters(a, b, scaling=[2.0, 1.0])
        >>> y = qlora_ext.linear_nf4(x, w4, lora_a=stacked, adapter_of_row=torch.tensor([1, -1, 0]))
        >>> torch.equal(y[1], qlora_ext.linear_nf4(x, w4)[1])
        True
    """
    if not isinstance(lora_a, Sequence) or len(lora_a) == 0:
        raise ValueError(f"lora_a: expected a list of at least one adapter, got {reprlib.repr(lora_a)}")
    count = len(lora_a)
    lora_b = _list("lora_b", lora_b, count)
    scaling = _list("scaling", scaling, count) if not isinstance(scaling, int | float) else [scaling] * count
    for e, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
        for name, matrix, first in (("lora_a", a, lora_a[0]), ("lora_b", b, lora_b[0])):
            if not isinstance(matrix, Tensor):
                raise TypeError(f"{name}[{e}]: expected a torch.Tensor, got {type(matrix).__name__}")
            if matrix.ndim not in (2, 3) or matrix.shape[:-2] != lora_a[0].shape[:-2]:
                experts = [*lora_a[0].shape[:1]]
                of_experts = f"three dimensions, the first of size {experts} (the experts of lora_a[0])"
                expected = of_experts if lora_a[0].ndim == 3 else "two dimensions"
                raise ValueError(f"{name}[{e}]: expected {expected}, got shape {list(matrix.shape)}")
            if matrix.dtype != first.dtype or matrix.device != first.device:
                raise ValueError(
                    f"{name}[{e}]: expected the dtype and device of {name}[0] ({first.dtype}, {first.device}), "
                    f"got {matrix.dtype}, {matrix.device}"
                )
        if a.shape[-1] != lora_a[0].shape[-1]:
            raise ValueError(f"lora_a[{e}]: expected {lora_a[0].shape[-1]} columns as lora_a[0], got {list(a.shape)}")
        if b.shape[-2] != lora_b[0].shape[-2]:
            raise ValueError(f"lora_b[{e}]: expected {lora_b[0].shape[-2]} rows as lora_b[0], got {list(b.shape)}")
        if b.shape[-1] != a.shape[-2]:
            raise ValueError(
                f"lora_b[{e}]: expected {a.shape[-2]} columns (the rank of lora_a[{e}]), got {list(b.shape)}"
            )
    ranks = [a.shape[-2] for a in lora_a]
    offsets = [0]
    for rank in ranks:
        offsets.append(offsets[-1] + rank)
    device = lora_a[0].device
    return StackedAdapters(
        torch.cat([*lora_a], dim=-2),
        torch.cat([*lora_b], dim=-1),
        torch.tensor(offsets, dtype=torch.int32, device=device),
        torch.tensor([float(number) for number in scaling], dtype=torch.float64, device=device),
        max(ranks),
        None if seeds is None else torch.tensor(_list("seed", seeds, count), dtype=torch.int64, device=device),
    )


_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8)


def adapter_of_each_row(adapter_of_row: Tensor | None, x: Tensor) -> Tensor:
    """``adapter_of_row`` as the operator takes it: int32, one per row of x [..., K].

    Raises:
        TypeError, ValueError: it is no tensor of integers, or its shape is neither the first dimensions of x nor flat.
    """
    if not isinstance(adapter_of_row, Tensor):
        raise TypeError(f"adapter_of_row: expected a tensor with several adapters, got {type(adapter_of_row).__name__}")
    if adapter_of_row.dtype not in _INTEGERS:
        raise ValueError(f"adapter_of_row: expected int32, got {adapter_of_row.dtype}")
    lead, shape = x.shape[:-1], adapter_of_row.shape
    if shape == lead[: len(shape)]:
        adapter_of_row = adapter_of_row.reshape(*shape, *(1,) * (len(lead) - len(shape))).expand(lead)
    elif len(shape) != 1 or shape[0] != lead.numel():
        raise ValueError(
            f"adapter_of_row: expected the leading dimensions of x {list(x.shape)}, the first of them, or "
            f"[{lead.numel()}], got shape {list(shape)}"
        )
    if adapter_of_row.dtype == torch.int64:  # numbers that int32 does not hold would wrap around
        adapter_of_row = adapter_of_row.clamp(-2, 2**31 - 1)
    return adapter_of_row.reshape(-1).to(torch.int32)
