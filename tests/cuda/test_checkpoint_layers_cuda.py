"""Layers with the weights of 4-bit checkpoints on CUDA, at sizes that fill no tile: decoded to the bits of the formats'
own formulas, with outputs and gradients that meet the bounds of a float64 oracle.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import accuracy
from accuracy import assert_accurate
from checkpoint_samples import Sample, awq, compressed_nvfp4, gptq, mlx, modelopt, mxfp4, packed
from forms import FORMS, oracle, random_weight
from qlora_ext.checkpoints import format_of
from qlora_ext.nn import Linear4bit
from qlora_ext.weight import Weight4bit
from samples import rows, to_f64

pytestmark = pytest.mark.cuda
BF16 = torch.bfloat16


def read(sample: Sample) -> tuple[Weight4bit, torch.Tensor]:
    """The weight, and its values by the format's formula."""
    kind, settings = format_of(sample.config)
    w4 = kind.read(sample.tensors, sample.shape, torch.bfloat16, settings, "up_proj")
    return w4, torch.from_numpy(sample.values)


def of_gpt_oss() -> tuple[Weight4bit, torch.Tensor]:
    sample = mxfp4((37, 96))
    sample.tensors["scales"].remainder_(8).add_(118)  # of about the size of a model's weights
    return read(sample)


def of_gguf(kind: str, n: int, k: int) -> tuple[Weight4bit, torch.Tensor]:
    w4 = random_weight(FORMS[kind], (n, k))
    return w4, torch.from_numpy(oracle(w4))


WEIGHTS: dict[str, Callable[[], tuple[Weight4bit, torch.Tensor]]] = {
    "MXFP4": of_gpt_oss,
    "NVFP4": lambda: read(compressed_nvfp4((37, 80))),
    "NVFP4 of ModelOpt": lambda: read(modelopt((41, 208))),
    "INT4": lambda: read(packed((37, 192))),
    "zero points, float32": lambda: read(packed((37, 192), 64, symmetric=False, dtype=torch.float32)),
    "AWQ": lambda: read(awq((40, 384))),
    "AWQ in groups of 32": lambda: read(awq((136, 96), 32)),
    "GPTQ": lambda: read(gptq((40, 384), symmetric=False)),
    "GPTQ in activation order": lambda: read(gptq((40, 384), symmetric=False, desc_act=True)),
    "MLX": lambda: read(mlx((37, 192))),
    "Q4_1": lambda: of_gguf("q4_1", 37, 96),
    "Q4_K": lambda: of_gguf("q4_k", 37, 256),
}


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("m", [1, 5, 45])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_layer(name: str, m: int, dtype: torch.dtype) -> None:
    w4, values = WEIGHTS[name]()
    n, k = w4.shape
    layer = Linear4bit(k, n, True, dtype, **w4.form.keywords)
    layer.set_weight(w4)
    layer.bias.data.copy_(normal(n, seed=1))
    layer.to("cuda")
    assert torch.equal(layer.weight4bit.dequantize(torch.float32).cpu(), values)

    size = float(values.square().mean().sqrt())
    x, dy = normal(m, k, seed=2).to("cuda", dtype).requires_grad_(), normal(m, n, seed=3).to("cuda", dtype)
    a = (normal(5, k, seed=4) * k**-0.5).to("cuda", dtype).requires_grad_()
    b = (normal(n, 5, seed=5) * size).to("cuda", dtype).requires_grad_()
    y = layer.fused_forward(x, a, b, 0.5)
    y.backward(dy)

    w, lora = to_f64(values), (to_f64(a), to_f64(b), 0.5, 0.0, 0, dtype)
    assert_accurate(y, accuracy.forward(rows(x), w, to_f64(layer.bias), *lora))
    assert_accurate(x.grad, accuracy.dx(rows(dy), w, *lora))
    expected = accuracy.dlora(rows(dy), rows(x), *lora)
    for got, of in zip((a.grad, b.grad), expected, strict=True):
        assert_accurate(got, of)
