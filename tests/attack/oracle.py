"""Compares the outputs of an operator with the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import forms
import reference
from qlora_ext.weight import TENSORS

# Relative to the terms' magnitudes: four roundings of a 16-bit dtype, or float32's of a sum of up to 200 terms.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
MOST_ELEMENTS = 1 << 20


def floats(t: Tensor | None) -> np.ndarray | None:
    return None if t is None else t.detach().double().numpy()


def flat(t: Tensor) -> np.ndarray:
    return t.detach().reshape(-1).numpy()


def rows(t: Tensor) -> np.ndarray:
    return floats(t.reshape(t.shape[:-1].numel(), t.shape[-1]))


def decoded(a: dict[str, Any], n: int, k: int) -> np.ndarray:
    return forms.decoded(a, n * k).reshape(n, k)


# The result of a linear operator or, if ``of`` is np.abs, the sum of its terms' magnitudes, which bounds its error.
Of = Callable[[np.ndarray], np.ndarray]


def identity(x: np.ndarray) -> np.ndarray:
    return x


def lora(a: dict[str, Any], of: Of) -> tuple:
    dense = [None if a[key] is None else of(floats(a[key])) for key in ("lora_a", "lora_b")]
    seed = a.get("seed", 0) if a.get("seed_tensor") is None else int(a["seed_tensor"])
    return (*dense, float(of(np.asarray(float(a["scaling"])))), a.get("dropout_p", 0.0), seed)


def low_rank(a: dict[str, Any], of: Of) -> tuple[np.ndarray | None, np.ndarray | None]:
    """h of x and g of dy, each if its operand is given."""
    lora_a, lora_b, scaling, dropout_p, seed = lora(a, of)
    h = g = None
    if "x" in a:
        x = of(rows(a["x"]))
        h = scaling * (x * reference.dropout_mask(x.shape, dropout_p, seed)) @ lora_a.T
    if "dy" in a:
        g = scaling * of(rows(a["dy"])) @ lora_b
    return h, g


def linear(a: dict[str, Any], of: Of = identity) -> list[np.ndarray]:
    x = rows(a["x"])
    w = decoded(a, a["out_features"], x.shape[1]).astype(np.float64)
    bias = None if a["bias"] is None else of(floats(a["bias"]))
    return [reference.linear(of(x), of(w), bias, *lora(a, of))]


def linear_with_h(a: dict[str, Any], of: Of = identity) -> list[np.ndarray]:
    (y,), h = linear(a, of), low_rank(a, of)[0]
    return [y, h if y.size else 0 * h]  # an empty product leaves h zero


def linear_dx(a: dict[str, Any], of: Of = identity) -> list[np.ndarray]:
    dy = rows(a["dy"])
    w = decoded(a, dy.shape[1], a["in_features"]).astype(np.float64)
    return [reference.linear_dx(of(dy), of(w), *lora(a, of))]


def linear_dx_with_g(a: dict[str, Any], of: Of = identity) -> list[np.ndarray]:
    (dx,), g = linear_dx(a, of), low_rank(a, of)[1]
    return [dx, g if dx.size else 0 * g]


def linear_dlora(a: dict[str, Any], of: Of = identity) -> list[np.ndarray]:
    _, _, _, dropout_p, seed = lora(a, of)
    dy, x = of(rows(a["dy"])), of(rows(a["x"]))
    h, g = low_rank(a, of)
    h, g = (made if a.get(name) is None else of(rows(a[name])) for name, made in (("h", h), ("g", g)))
    return [g.T @ (x * reference.dropout_mask(x.shape, dropout_p, seed)), dy.T @ h]


PER_EXPERT = (*TENSORS, "bias", "lora_a", "lora_b")


def grouped(one: Callable[..., list[np.ndarray]], a: dict[str, Any], out: Sequence[Tensor], *of: Of) -> list:
    """Results in the shapes of ``out``.

    Each expert is computed over all rows, because dropout depends on their indices, and only its own rows are used.
    """
    expected = [np.zeros(tuple(t.shape)) for t in out]
    by_expert = one is linear_dlora
    begin = 0
    for e, end in enumerate(a["offsets"].tolist()):
        part = {key: v[e] if key in PER_EXPERT and v is not None else v for key, v in a.items()}
        own = slice(begin, end)
        for key in ("dy", "g") if by_expert else ():
            if a.get(key) is not None:
                part[key] = torch.zeros_like(a[key])
                part[key][own] = a[key][own]
        if end > begin and (by_expert or expected[0].size):
            outs = [t[e] for t in out] if by_expert else out
            for whole, answer in zip(expected, several(one, part, outs, *of), strict=True):
                whole[e if by_expert else own] = answer if by_expert else answer[own]
        begin = end
    return expected


def several(one: Callable[..., list[np.ndarray]], a: dict[str, Any], out: Sequence[Tensor], *of: Of) -> list:
    """Results, of several adapters in the shapes of ``out``.

    Each adapter is computed over all rows, and only its own rows are used.
    """
    if a.get("adapter_of_row") is None:
        return one(a, *of)
    expected = [np.zeros(tuple(t.shape)) for t in out]
    of_row, ends = flat(a["adapter_of_row"]), flat(a["rank_offsets"])
    for e in range(-1, len(ends) - 1):
        ranks = slice(ends[e], ends[e + 1]) if e >= 0 else slice(0)
        part = {**a, "lora_a": a["lora_a"][ranks], "lora_b": a["lora_b"][:, ranks]}
        part["scaling"] = float(a["scalings"][e])
        if a["seeds"] is not None:
            part["seed"] = int(a["seeds"][e])
        own = of_row == e
        if one is linear_dlora:
            dy = a["dy"].reshape(-1, a["dy"].shape[-1])
            part["dy"] = torch.where(torch.from_numpy(own)[:, None], dy, torch.zeros_like(dy))
            expected[0][ranks], expected[1][:, ranks] = one(part, *of)
        elif expected[0].size:
            width = expected[0].shape[-1]
            expected[0].reshape(-1, width)[own] = one(part, *of)[0].reshape(-1, width)[own]
    return expected


def quantize_nf4(a: dict[str, Any]) -> list[np.ndarray]:
    return list(reference.quantize_nf4(flat(a["w"].float()), a["block_size"]))


def quantize_absmax(a: dict[str, Any]) -> list[np.ndarray]:
    absmax = flat(a["absmax"])
    return list(reference.quantize_absmax(absmax, min(a["nested_block_size"], absmax.size + 1)))


def dequantize_absmax(a: dict[str, Any]) -> list[np.ndarray]:
    codes, nested_block = flat(a["codes"]), min(a["nested_block_size"], a["codes"].numel() + 1)
    mean = np.float32(a["nested_offset"].item())
    return [reference.dequantize_absmax(codes, flat(a["nested_absmax"]), mean, nested_block)]


def dequantize_nf4(a: dict[str, Any]) -> list[np.ndarray]:
    return [decoded(a, 1, int(np.prod([int(d) for d in a["shape"]])))]


def search_absmax_nf4(a: dict[str, Any]) -> list[np.ndarray]:
    return [reference.search_absmax_nf4(rows(a["w"]), floats(a["importance"]), a["block_size"])]


def encode_nf4(a: dict[str, Any]) -> list[np.ndarray]:
    w, absmax, block = rows(a["w"]), flat(a["absmax"]), a["block_size"]
    if a["feedback"] is None:
        return [reference.encode_nf4(w, absmax, block)]
    codes = reference.encode_with_feedback(w, absmax, a["feedback"].numpy(), flat(a["order"]), block).reshape(-1)
    padded = np.append(codes, np.uint8(7)) if codes.size % 2 else codes
    return [padded[0::2] << 4 | padded[1::2]]


def encode_nf4_stochastic(a: dict[str, Any]) -> list[np.ndarray]:
    seed = int(a["seed"]) & (1 << 64) - 1
    return [reference.encode_nf4_stochastic(rows(a["w"]), flat(a["absmax"]), a["block_size"], seed)]


ORACLE = {
    "search_absmax_nf4": search_absmax_nf4,
    "encode_nf4": encode_nf4,
    "encode_nf4_stochastic": encode_nf4_stochastic,
    "quantize_nf4": quantize_nf4,
    "quantize_absmax": quantize_absmax,
    "dequantize_absmax": dequantize_absmax,
    "dequantize_nf4": dequantize_nf4,
    "linear_nf4": linear,
    "linear_nf4_with_h": linear_with_h,
    "linear_nf4_dx": linear_dx,
    "linear_nf4_dx_with_g": linear_dx_with_g,
    "linear_nf4_dlora": linear_dlora,
}


def of_fitting_size(t: Tensor) -> bool:
    return t.layout == torch.strided and not t.is_nested and t.numel() <= MOST_ELEMENTS


def tame(value: Any) -> bool:
    """Whether sums of products with it stay finite in every dtype. Other magnitudes are tested by the sweeps."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or not value.numel() or bool((flat(value.double().abs()) < 1e3).all())
    return abs(float(value)) < 1e3


def disagreement(name: str, a: dict[str, Any], out: Any) -> str | None:
    """The error in ``out``, the result of the operator ``name`` with arguments ``a``; None if there is none."""
    one = ORACLE.get(name.removeprefix("grouped_"))
    if one is None:
        return None
    outs = (out,) if isinstance(out, Tensor) else tuple(out)
    tensors = [v for v in a.values() if isinstance(v, Tensor)]
    if any(t.is_meta for t in tensors):
        return None if all(t.is_meta for t in outs) else "a meta tensor among the arguments, and an answer with values"
    if any(isinstance(v, torch.dtype) for key, v in a.items() if key != "dtype"):
        return None  # torch converts a dtype to its number
    if not all(of_fitting_size(t) for t in (*tensors, *outs)) or not all(map(tame, (*tensors, a.get("scaling", 0)))):
        return None
    a = {key: v.detach().resolve_neg() if isinstance(v, Tensor) else v for key, v in a.items()}
    a |= {key: int(v) for key, v in a.items() if isinstance(v, bool)}
    is_linear = "linear" in name

    def answers(*of: Of) -> list[np.ndarray]:
        return (grouped if name.startswith("grouped") else several)(one, a, outs, *of)

    expected = answers()
    sizes = answers(np.abs) if is_linear else expected
    exact = name.startswith(("quantize", "search", "encode"))
    for i, (got, answer, size) in enumerate(zip(outs, expected, sizes, strict=True)):
        values = flat(got.double())
        answer = np.asarray(answer, np.float64).reshape(-1)
        if values.shape != answer.shape:
            return f"output {i}: expected {answer.size} elements, got {list(got.shape)}"
        error, norm = float(np.linalg.norm(values - answer)), float(np.linalg.norm(size))
        if not error <= (0.0 if exact else TOLERANCE[got.dtype] * norm + 1e-30):
            return f"output {i}: {error:.3g} off an answer of terms of norm {norm:.3g}"
    return None
