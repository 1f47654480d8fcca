"""Odd arguments to every operator and Python entry point: a child of test_arguments.py.

A call has good arguments, of which one or two are replaced by odd ones. It must either work, and agree with the oracle
if there is one, or raise an exception of an expected kind that names an argument.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import random
import re
import resource
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import forms
import qlora_ext
from campaign import Problem, serve
from oracle import disagreement
from qlora_ext.nn import Embedding4bit, Linear4bit
from qlora_ext.weight import TENSORS

OPS = torch.ops.qlora
EXPECTED = (ValueError, TypeError, RuntimeError, MemoryError)
MOST_MEMORY = 6 << 30  # address space of a child in addition to torch's mappings

DTYPES = [
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.complex64, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.quint8),
]
NUMBERS = [0, 1, -1, 2, 3, 7, 32, 33, 48, 64, 65, 128, 255, 256, 1 << 15, (1 << 31) - 1, 1 << 31, -(1 << 31), 1 << 32]
NUMBERS += [(1 << 53) + 1, 1 << 61, 1 << 62, (1 << 63) - 1, (1 << 63) - 63, -(1 << 63), 1 << 63, 1 << 64, 10**30]
FLOATS = [0.0, -0.0, 0.5, 1.0, 1.5, -1.0, float("nan"), float("inf"), -float("inf"), 1e308, 5e-324, 1e-45, 1 + 1e-16]
THINGS = [None, True, "64", "x", b"", 1.5, 2 + 1j, [], [1, 2], {}, object(), torch.tensor(64), torch.float32, slice(3)]

# torch's exceptions that name no argument: about memory, kinds of tensors, and dtypes without a kernel.
NAMELESS = (
    "alloc|memory|Storage size|NestedTensor|Could not run '(qlora|aten)::|no tensor arguments|Not yet supported|"
    "unsupported scalarType|autocast"
)


def one_of(rng: random.Random, *makers: Callable[[], Any]) -> Any:
    return rng.choice(makers)()


def odd_int(rng: random.Random, good: int) -> Any:
    return one_of(
        rng,
        lambda: rng.choice(NUMBERS),
        lambda: rng.choice(NUMBERS),
        lambda: good + rng.choice([-1, 1, 1 << 32]),
        lambda: good + (1 << rng.randint(50, 63)),  # products with it may wrap around to the correct one
        lambda: rng.choice([*THINGS, *FLOATS]),
    )


def odd_shape(rng: random.Random, good: list[int]) -> Any:
    numel = 1
    for size in good:
        numel *= size
    odd = rng.getrandbits(62) | 1
    return one_of(
        rng,
        lambda: [*[1] * rng.randint(1, 90), *good],
        lambda: [numel],
        lambda: [*good, rng.choice(NUMBERS[:-3])],
        lambda: [rng.choice(NUMBERS[:-3]) for _ in range(rng.randint(0, 5))],
        lambda: [odd, numel * pow(odd, -1, 1 << 64) % (1 << 64)],  # their product wraps around to the correct one
        lambda: [1 << 62, 4, *good],
        lambda: [0, 1 << 62, 1 << 62],
        lambda: [-size for size in good],
        lambda: rng.choice(THINGS),
    )


def strided(rng: random.Random, t: Tensor) -> Tensor:
    """The same values with different strides."""
    return one_of(
        rng,
        lambda: t.t().contiguous().t() if t.ndim == 2 else t.clone(),
        lambda: torch.stack([t, t], -1)[..., 0],
        lambda: torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[1:].view(t.shape) if t.numel() else t,
        lambda: t.flip(0) if t.ndim else t,
        lambda: t.new_zeros(1).expand(t.shape),
        lambda: torch._neg_view(-t) if t.is_floating_point() else t,
    )


def odd_tensor(rng: random.Random, t: Tensor) -> Any:
    if t.numel() > 1 << 20:  # odd already
        return t

    def valued(value: float) -> Tensor:
        out = t.clone()
        if out.numel() and out.is_floating_point():
            out.view(-1)[rng.randrange(out.numel())] = value
        return out

    def many(rows: int) -> Tensor:
        return t.new_zeros(1).expand(rows, *t.shape[1:]) if t.ndim else t.expand(rows)

    return one_of(
        rng,
        lambda: rng.choice([*THINGS, *NUMBERS]),
        lambda: t.to(rng.choice(DTYPES[:-1])),
        lambda: t.to(rng.choice(DTYPES[:4])),
        lambda: t.to("meta"),
        lambda: t[..., :-1] if t.ndim else t,
        lambda: t[1:] if t.ndim else t.new_zeros(2),
        lambda: torch.cat([t, t]) if t.ndim else t.reshape(1),
        lambda: t.reshape(-1),
        lambda: t.unsqueeze(rng.randint(0, t.ndim)),
        lambda: t.reshape(*[1] * rng.randint(1, 90), *t.shape),
        lambda: t.new_empty(rng.choice([(), (0,), (0, 64), (64, 0), (0, 0), (1, 0, 64), (48, 64), (1 << 62, 0)])),
        lambda: many(rng.choice([1 << 31, 1 << 40, 1 << 55])),
        lambda: strided(rng, t),
        lambda: strided(rng, t),
        lambda: valued(rng.choice(FLOATS)),
        lambda: nn.Parameter(t, requires_grad=t.is_floating_point()),
        lambda: t.to_sparse() if t.ndim else t,
        lambda: t.numpy() if t.dtype != torch.bfloat16 else t.tolist(),
        lambda: t.tolist(),
        lambda: torch.quantize_per_tensor(t.float(), 0.1, 3, torch.quint8),
        lambda: torch.nested.nested_tensor([t, t]) if t.ndim else t,
    )


def odd(rng: random.Random, name: str, good: Any) -> Any:
    if isinstance(good, Tensor) and not isinstance(good, qlora_ext.Weight4bit):
        return odd_tensor(rng, good)
    if name == "shape":
        return odd_shape(rng, good)
    if isinstance(good, bool) or good is None:
        return rng.choice([*THINGS, *NUMBERS])
    if isinstance(good, int):
        return odd_int(rng, good)
    if isinstance(good, float):
        return rng.choice([*FLOATS, *FLOATS, *NUMBERS, *THINGS])
    if isinstance(good, torch.dtype):
        return rng.choice([*DTYPES, *DTYPES, *THINGS, *range(-2, 60)])
    if isinstance(good, qlora_ext.Weight4bit):
        field, value = rng.choice(list(good.fields.items()))
        value = odd(rng, field, list(value) if field == "shape" else value)
        try:
            return qlora_ext.Weight4bit(**(good.fields | {field: value}))
        except (TypeError, ValueError) as error:
            if field not in str(error):
                raise
            return good
    return rng.choice([*THINGS, *NUMBERS])


def good_arguments(rng: random.Random) -> dict[str, Any]:
    """Small consistent arguments by name."""
    torch.manual_seed(rng.getrandbits(60))
    m, n, k = rng.choice([0, 1, 3, 20, 70]), rng.choice([1, 16, 48, 65]), rng.choice([64, 100, 192])
    dtype, rank, experts = rng.choice([torch.float32, torch.bfloat16, torch.float16]), rng.choice([0, 1, 4]), 3
    block, nested_block, double_quant = rng.choice([32, 64, 256]), rng.choice([1, 64, 256]), rng.random() < 0.7

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    if rng.random() < 0.5:
        w4 = qlora_ext.quantize_nf4(torch.randn(n, k), block, double_quant, nested_block)
    else:
        form = rng.choice(list(forms.FORMS.values()))
        form = dataclasses.replace(form, block_size=block, nested_block_size=nested_block)
        w4 = forms.random_weight(form, (n, k), rng.getrandbits(60))
    codes = qlora_ext.quantize_nf4(torch.randn(n, k), block, True, nested_block)
    good = {name: getattr(w4, name) for name in (*TENSORS, "code")}
    good |= {"block_size": block, "nested_block_size": nested_block, "out_features": n, "in_features": k}
    good |= {"w": randn(n, k), "x": randn(m, k), "dy": randn(m, n), "bias": randn(n), "shape": [n, k], "dtype": dtype}
    good |= {"lora_a": randn(rank, k), "lora_b": randn(n, rank), "scaling": 0.5, "seed": 12}
    good |= {"h": None, "g": None, "importance": torch.rand(k), "activations": "exact"}
    good |= {"feedback": torch.eye(k), "order": torch.randperm(k)}
    good["seed_tensor"] = rng.choice([None, torch.tensor(-12)])
    good |= dict.fromkeys(("adapter_of_row", "rank_offsets", "scalings", "seeds")) | {"max_rank": 0}
    if rng.random() < 0.3:  # two adapters, of which each row uses one or none
        first = rank // 2
        good |= {"adapter_of_row": torch.randint(-1, 2, (m,), dtype=torch.int32), "max_rank": rank - first}
        good |= {"rank_offsets": torch.tensor([0, first, rank], dtype=torch.int32), "scaling": 1.0}
        good |= {"scalings": torch.tensor([0.5, 2.0], dtype=torch.float64), "seed_tensor": None}
        good["seeds"] = rng.choice([None, torch.tensor([3, -4])])
    good |= {"dropout_p": rng.choice([0.0, 0.3]), "w4": w4, "codes": codes.absmax, "_codes": codes}
    good |= {"offsets": torch.tensor(sorted(rng.randint(0, m) for _ in range(experts)))}
    good |= {"_experts": experts, "compute_dtype": dtype, "double_quant": double_quant}
    good |= {"ids": torch.randint(0, n, (m,)), "linear": nn.Linear(k, n, dtype=dtype), "skip": ("lm_head",)}
    return good | {
        "model": nn.Sequential(nn.Linear(k, n)),
        "embeddings": False,
        "padding_idx": None,
        "skip_modules": None,
    }


def stacked(t: Any, experts: int) -> Any:
    return torch.stack([t] * experts) if isinstance(t, Tensor) else t


def operator_call(rng: random.Random, name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    good = good_arguments(rng)
    operator = getattr(OPS, name).default
    names = [a.name for a in operator._schema.arguments]
    if name == "quantize_absmax":
        good["absmax"] = torch.rand(rng.choice([1, 48, 300]))
    if name in ("quantize_nf4", "search_absmax_nf4", "encode_nf4"):
        good["code"] = "nf4"
    if name == "encode_nf4":
        good["absmax"] = torch.rand(math.ceil(good["w"].numel() / good["block_size"]))
    if name == "dequantize_absmax":
        good["nested_absmax"], good["nested_offset"] = good["_codes"].nested_absmax, good["_codes"].nested_offset
    call = {a: good[a] for a in names}
    if name.startswith("grouped"):
        shared = {"x", "dy", "offsets", "seed_tensor", "adapter_of_row", "rank_offsets", "scalings", "seeds"}
        call = {a: v if a in shared else stacked(v, good["_experts"]) for a, v in call.items()}
    return operator, call


def linear4bit(x: Tensor, **arguments: Any) -> Tensor:
    return Linear4bit(**arguments)(x)


def embedding4bit(ids: Tensor, **arguments: Any) -> Tensor:
    return Embedding4bit(**arguments)(ids)


def dequantize(w4: qlora_ext.Weight4bit, dtype: torch.dtype) -> Tensor:
    return w4.dequantize(dtype)


FORM = ["block_size", "double_quant", "nested_block_size"]
# Excluded, because a module calls methods of its input, like torch's modules.
ALWAYS_GOOD = {("Linear4bit", "x"), ("Embedding4bit", "ids")}
PYTHON: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "qlora_ext.quantize_nf4": (qlora_ext.quantize_nf4, ["w", *FORM]),
    "qlora_ext.dequantize_nf4": (qlora_ext.dequantize_nf4, ["w4", "dtype"]),
    "Weight4bit.dequantize": (dequantize, ["w4", "dtype"]),
    "qlora_ext.linear_nf4": (
        qlora_ext.linear_nf4,
        ["x", "w4", "bias", "lora_a", "lora_b", "scaling", "dropout_p", "seed", "activations"],
    ),
    "Linear4bit": (linear4bit, ["x", "in_features", "out_features", "compute_dtype", "activations", *FORM]),
    "Linear4bit.from_linear": (Linear4bit.from_linear, ["linear", "compute_dtype", *FORM]),
    "Embedding4bit": (embedding4bit, ["ids", "num_embeddings", "embedding_dim", "padding_idx", "compute_dtype", *FORM]),
    "quantize_model": (
        qlora_ext.quantize_model,
        ["model", "skip", "block_size", "double_quant", "embeddings", "activations"],
    ),
    "QLoRAConfig": (qlora_ext.QLoRAConfig, [*FORM, "compute_dtype", "skip_modules", "embeddings", "activations"]),
}
OPERATORS = [
    *("search_absmax_nf4", "encode_nf4", "quantize_nf4", "quantize_absmax", "dequantize_absmax", "dequantize_nf4"),
    *("linear_nf4", "linear_nf4_dx", "linear_nf4_dlora"),
    *("grouped_linear_nf4", "grouped_linear_nf4_dx", "grouped_linear_nf4_dlora"),
]


def python_call(rng: random.Random, name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    function, names = PYTHON[name]
    good = good_arguments(rng)
    good |= {"num_embeddings": good["out_features"], "embedding_dim": good["in_features"]}
    return function, {a: good[a] for a in names}


def described(value: Any) -> str:
    if isinstance(value, qlora_ext.Weight4bit):
        return "Weight4bit(" + ", ".join(f"{k}={described(v)}" for k, v in value.fields.items()) + ")"
    if isinstance(value, Tensor):
        strides = list(value.stride()) if value.layout == torch.strided and not value.is_nested else value.layout
        shape = "nested" if value.is_nested else list(value.shape)
        device = "" if value.device.type == "cpu" else f", {value.device}"
        return f"tensor({value.dtype}, {shape}, strides {strides}{device})"
    return repr(value)[:200]


def wrong_exception(error: Exception, names: list[str]) -> str | None:
    text = str(error)
    if isinstance(error, IndexError) and re.match("rows: |index out of range", text):  # like nn.Embedding
        return None
    said = f"{type(error).__name__}: {text[:500]}"
    if not isinstance(error, EXPECTED):
        return f"raised {said}"
    if isinstance(error, MemoryError) or re.search(NAMELESS, text):
        return None
    return None if set(re.findall(r"\w+", text)) & set(names) else f"names no argument: {said}"


def calls(make: Callable[[random.Random, str], tuple[Callable[..., Any], dict[str, Any]]], names: list[str]) -> Any:
    def problem(rng: random.Random) -> Problem:
        name = rng.choice(names)
        function, arguments = make(rng, name)
        for _ in range(rng.choice([1, 1, 1, 2])):
            changed = rng.choice([a for a in arguments if (name, a) not in ALWAYS_GOOD])
            try:
                arguments[changed] = odd(rng, changed, arguments[changed])
            except (RuntimeError, TypeError, ValueError, IndexError, MemoryError):  # torch cannot make such a tensor
                continue
        text = ", ".join(f"{a}={described(v)}" for a, v in arguments.items())

        def run() -> str | None:
            try:
                out = function(**arguments)
            except Exception as error:
                of_weight = (*TENSORS, "shape", "block_size", "nested_block_size", "code") if "w4" in arguments else ()
                return wrong_exception(error, [*arguments, *of_weight, "weight", "dtype"])
            return disagreement(name, arguments, out)

        return f"{name}({text})", run

    return problem


if __name__ == "__main__":
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MOST_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    serve({"operators": calls(operator_call, OPERATORS), "python": calls(python_call, list(PYTHON))})
