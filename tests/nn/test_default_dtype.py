"""The package does not depend on torch's default dtype or device, which other libraries may change."""

from __future__ import annotations

import ast
import contextlib
import copy
import json
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qlora_ext
from qlora_ext.nn import Embedding4bit, Linear4bit

PYTHON = pathlib.Path(__file__).parents[2] / "python"
# Functions that make new tensors, in torch's default dtype on its default device unless given.
FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal"),
    *("ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "zeros"),
}
DEFAULTS = ["bfloat16", "float16", "float64", "meta"]


@contextlib.contextmanager
def default(name: str) -> Iterator[None]:
    """Sets the default dtype, or the default device."""
    before = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        if name == "meta":
            stack.enter_context(torch.device("meta"))
        else:
            stack.callback(torch.set_default_dtype, before)
            torch.set_default_dtype(getattr(torch, name))
        yield


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


WEIGHT = drawn(48, 64)
STATE = {
    double: qlora_ext.quantize_nf4(WEIGHT, double_quant=double).to_bitsandbytes("w.weight") for double in (True, False)
}
TABLES = [nn.Embedding(50, width) for width in (64, 100)]
IDS = torch.tensor([3, 49, 0])


def quantized() -> Iterator[Tensor]:
    for double in (True, False):
        w4 = qlora_ext.quantize_nf4(WEIGHT, double_quant=double)
        yield from (*w4.tensors.values(), w4.dequantize(torch.float32))


def through_bitsandbytes() -> Iterator[Tensor]:
    for double, state in STATE.items():
        w4 = qlora_ext.NF4Weight.from_bitsandbytes(state, "w.weight")
        yield from (w4.dequantize(), *w4.to_bitsandbytes("w.weight").values())
        assert double == w4.double_quant


def layer() -> Iterator[Tensor]:
    module = Linear4bit.from_linear(DENSE)
    module.to(torch.bfloat16).to(torch.float32).to("cpu")
    x = X.clone().requires_grad_()
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    torch.manual_seed(0)
    y = module.fused_forward(x, a, b, 2.0, 0.1)
    y.backward(Y)
    yield from (y, x.grad, a.grad, b.grad, module.dequantize(), module.to_linear().weight)
    w4 = module.weight4bit
    seed = qlora_ext.linear_nf4(X, w4, None, A, B, 2.0, 0.1, seed=5)
    yield seed
    yield torch.func.jvp(lambda x: qlora_ext.linear_nf4(x, w4), (X,), (X,))[1]


DENSE, X, Y = nn.Linear(64, 48), drawn(5, 64, seed=1), drawn(5, 48, seed=2)
A, B = drawn(4, 64, seed=3), drawn(48, 4, seed=4)


def embedding() -> Iterator[Tensor]:
    for dense in TABLES:
        table = Embedding4bit.from_embedding(dense)
        yield from (table(IDS), torch.func.vmap(table)(IDS), table.to_embedding().weight)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


BLOCKS, CALIBRATION = Blocks(), drawn(4, 16, 64, seed=5)


def model_of_blocks() -> Iterator[Tensor]:
    for calibration in (None, [CALIBRATION]):
        model = qlora_ext.quantize_model(copy.deepcopy(BLOCKS), skip=(), calibration=calibration)
        yield from (*model.state_dict().values(), model(X))


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("entry", [quantized, through_bitsandbytes, layer, embedding, model_of_blocks])
def test_the_library(entry: Callable[[], Iterator[Tensor]], name: str) -> None:
    expected = [t.detach() for t in entry()]
    with default(name):
        found = [t.detach() for t in entry()]
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    assert all(t.device.type == "cpu" for t in found)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def language_models() -> Iterator[Tensor]:
    """The quantized model, its sensitivity and its trained adapter, computed under another default."""
    from peft import LoraConfig, get_peft_model

    from tiny_models import make, token_ids

    dense, ids = make("llama", torch.float32), token_ids(4, 16)
    for options in ({"embeddings": True}, {"calibration": qlora_ext.Calibration(tokens=32, length=8)}):
        yield from qlora_ext.quantize_model(copy.deepcopy(dense), **options).state_dict().values()
    four = qlora_ext.quantize_model(copy.deepcopy(dense))
    found = qlora_ext.check_model(four, dense, ids)
    costs = qlora_ext.sensitivity(dense, ids).layers
    assert found.problems == []
    assert found.increase is not None
    yield torch.tensor([found.increase.nats, *(cost.loss for cost in costs)], dtype=torch.float64)
    adapted = get_peft_model(four, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    for adapter in adapted.parameters():
        if adapter.requires_grad:
            torch.nn.init.constant_(adapter, 0.01)
    adapted = adapted.float()
    adapted(ids, labels=ids).loss.backward()
    yield from (p.grad for p in adapted.parameters() if p.grad is not None)
    yield from adapted.merge_and_unload().state_dict().values()


def test_language_models() -> None:
    pytest.importorskip("peft", reason="PEFT is not installed")
    expected = [t.detach() for t in language_models()]
    with default("bfloat16"):
        found = [t.detach() for t in language_models()]
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", DEFAULTS)
def test_bitsandbytes_layers_are_adopted(name: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from bitsandbytes_layers import bare

    layer = bare()
    model = nn.ModuleDict({"layer": layer})
    other = copy.deepcopy(model)
    qlora_ext.adopt(other)
    expected = other["layer"](X)
    with default(name):
        qlora_ext.adopt(model)
        assert isinstance(model["layer"], Linear4bit)
        assert torch.equal(model["layer"](X), expected)


def test_threads_of_which_some_have_another_default_device() -> None:
    """The first call of a process must not cache tensors made under another thread's default device."""
    expected = list(through_bitsandbytes())
    wrong: list[Any] = []

    def work(device: str | None) -> None:
        with contextlib.nullcontext() if device is None else torch.device(device):
            for _ in range(20):
                found = list(through_bitsandbytes())
                wrong.extend(t for t, other in zip(found, expected, strict=True) if not torch.equal(t, other))

    threads = [threading.Thread(target=work, args=(device,)) for device in ("meta", None, "meta", None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_state_of_bitsandbytes_holds_the_values_of_the_format() -> None:
    state = STATE[True]
    codes = torch.arange(0, 256, 17, dtype=torch.uint8)
    values = torch.ops.qlora.dequantize_nf4(codes, torch.ones(1), None, None, 32, 256, [32], torch.float32)
    assert torch.equal(state["w.weight.quant_map"], values[::2])
    nested = torch.arange(256).to(torch.uint8)
    expected = torch.ops.qlora.dequantize_absmax(nested, torch.ones(1), torch.zeros(()), 256)
    assert torch.equal(state["w.weight.nested_quant_map"], expected)
    assert json.loads(bytes(state["w.weight.quant_state.bitsandbytes__nf4"].tolist()))["shape"] == [48, 64]


def test_no_tensor_is_made_with_a_default_dtype_or_device() -> None:
    found = []
    for file in sorted(PYTHON.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if ast.unparse(node.func.value) == "torch" and node.func.attr in FACTORIES:
                given = {keyword.arg for keyword in node.keywords}
                # ``**form`` may contain both.
                if None not in given and not given >= {"dtype", "device"}:
                    found.append(f"{file.relative_to(PYTHON)}:{node.lineno}: {ast.unparse(node)}")
    assert found == []
