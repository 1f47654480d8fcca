"""FLOP formulas of the operators for torch's ``FlopCounterMode``.

A multiplication and an addition count as two operations. Decoding and dropout count as none.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from .._library import OPERATORS
from ..arguments import arguments_of


def _tokens(shape: Any) -> int:
    return math.prod(shape[:-1])


def _rank(a: Any) -> int:
    """The rank of the adapter; of several adapters per call, the largest."""
    if a.lora_a is None:
        return 0
    rank: int = a.lora_a[-2] if getattr(a, "adapter_of_row", None) is None else a.max_rank
    return rank


def _product(a: Any, tokens: int, n: int, k: int) -> int:
    """The operations of x · Wᵀ or dy · W, and of the two products of LoRA."""
    flops: int = 2 * tokens * (n * k + _rank(a) * (n + k))
    return flops


def _forward(a: Any) -> int:
    return _product(a, _tokens(a.x), a.out_features, a.x[-1])


def _dx(a: Any) -> int:
    return _product(a, _tokens(a.dy), a.dy[-1], a.in_features)


def _dlora(a: Any) -> int:
    """The operations of dA = gᵀ · x and dB = dyᵀ · h, and of g and h unless they are given."""
    of_g, of_h = (2 * _tokens(a.x) * _rank(a) * width for width in (a.dy[-1], a.x[-1]))
    made = (of_g if getattr(a, "g", None) is None else 0) + (of_h if getattr(a, "h", None) is None else 0)
    flops: int = of_g + of_h + made
    return flops


_FORMULAS = {"linear_nf4": _forward, "linear_nf4_dx": _dx, "linear_nf4_dlora": _dlora}


def _register(name: str) -> None:
    kind = name.removeprefix("grouped_").partition("_with_")[0]
    if kind not in _FORMULAS:
        return
    named = arguments_of(getattr(torch.ops.qlora, name).default)

    def formula(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return _FORMULAS[kind](named(*args, **kwargs))

    register_flop_formula(getattr(torch.ops.qlora, name))(formula)


for _name in OPERATORS:
    _register(_name)
