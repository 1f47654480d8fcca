"""Embedding4bit and the head tied to it give the rows of the decoded table, and decode only the requested rows."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import qlora_ext
from qlora_ext.nn import Embedding4bit, Linear4bit, TiedLinear4bit, quantize_model

# Rows of full blocks, of parts of one, across several blocks at odd offsets, and of an odd number of elements.
WIDTHS = [64, 128, 32, 96, 100, 33, 7, 1]


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests() -> None:
    torch._dynamo.reset()  # every test compiles the same forward again, and torch limits the number of recompilations


def table(width: int = 64, count: int = 50, dtype: torch.dtype = torch.float32, **options) -> Embedding4bit:
    return Embedding4bit.from_embedding(nn.Embedding(count, width, dtype=dtype), **options)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("block_size", "double_quant"), [(64, True), (64, False), (128, True)])
def test_rows_are_those_of_the_decoded_table(width: int, block_size: int, double_quant: bool) -> None:
    embedding = nn.Embedding(1001, width)
    module = Embedding4bit.from_embedding(embedding, block_size=block_size, double_quant=double_quant)
    dense = qlora_ext.quantize_nf4(embedding.weight, block_size, double_quant).dequantize(torch.float32)
    ids = torch.tensor([[0, 1, 1000], [999, 17, 1]])
    assert torch.equal(module(ids), dense[ids])
    every = torch.arange(1001)
    assert torch.equal(module(every), dense)
    assert torch.equal(module(every.int()), dense)
    assert module(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0, width)
    assert module(torch.tensor(5)).shape == (width,)
    assert torch.equal(module.dequantize(), dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    module = table(dtype=dtype)
    rows = module(torch.arange(50))
    assert rows.dtype == dtype
    assert torch.equal(rows, module.dequantize(dtype))
    assert module.half()(torch.arange(3)).dtype == torch.float16


@pytest.mark.parametrize("width", [64, 100])
@pytest.mark.parametrize("row", [-1, 50, 2**40])
def test_an_index_out_of_range(width: int, row: int) -> None:
    with pytest.raises(IndexError):
        table(width)(torch.tensor([3, row]))


@pytest.mark.parametrize("width", [64, 100])
@pytest.mark.parametrize(
    ("backend", "dynamic"), [("eager", None), ("aot_eager", None), ("aot_eager", True), ("inductor", True)]
)
def test_an_index_out_of_range_in_a_compiled_graph(width: int, backend: str, dynamic: bool | None) -> None:
    """The same errors as torch's embedding: IndexError from ATen, RuntimeError from Inductor's code."""
    module = table(width)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend=backend)
    assert torch.equal(compiled(torch.tensor([0, 49])), module(torch.tensor([0, 49])))
    for row in (-1, -50, 50, 2**40):
        with pytest.raises(RuntimeError if backend == "inductor" else IndexError, match=r"index out of (range|bounds)"):
            compiled(torch.tensor([3, row]))
    assert torch.equal(compiled(torch.tensor([0, 49])), module(torch.tensor([0, 49])))


@pytest.mark.parametrize("width", [64, 100])
def test_an_index_out_of_range_in_an_exported_graph_and_under_vmap(width: int) -> None:
    module = table(width)
    tokens = {"ids": {0: torch.export.Dim("tokens", min=2, max=1024)}}
    exported = torch.export.export(module, (torch.arange(4),), dynamic_shapes=tokens).module()
    assert torch.equal(exported(torch.tensor([0, 49, 7])), module(torch.tensor([0, 49, 7])))
    for row in (-1, 50, 2**40):
        for call in (exported, torch.func.vmap(module)):
            with pytest.raises(IndexError):
                call(torch.tensor([3, row, 7]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.uint8])
@pytest.mark.parametrize("compiled", [False, True])
def test_indices_of_other_dtypes(dtype: torch.dtype, compiled: bool) -> None:
    """The same as torch's embedding, which accepts only int32 and int64."""
    module = torch.compile(table(), backend="eager", fullgraph=True) if compiled else table()
    with pytest.raises((TypeError, RuntimeError), match="expected row numbers, int32 or int64"):
        module(torch.ones(2, dtype=dtype))


def test_from_embedding_and_back() -> None:
    embedding = nn.Embedding(20, 64, padding_idx=3).eval()
    module = Embedding4bit.from_embedding(embedding)
    assert (module.padding_idx, module.training) == (3, False)
    assert torch.equal(module(torch.tensor(3)), torch.zeros(64))
    dense = module.to_embedding()
    assert type(dense) is nn.Embedding
    assert dense.padding_idx == 3
    assert torch.equal(dense(torch.arange(20)), module(torch.arange(20)))
    with pytest.raises(ValueError, match="max_norm"):
        Embedding4bit.from_embedding(nn.Embedding(4, 8, max_norm=1.0))
    with pytest.raises(TypeError, match="expected an nn.Embedding, got Linear"):
        Embedding4bit.from_embedding(nn.Linear(4, 8))
    with pytest.raises(ValueError, match="padding_idx: expected a row of 20, got 20"):
        Embedding4bit(20, 64, padding_idx=20)


def test_only_the_requested_rows_are_decoded() -> None:
    module = table(64, 4096)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "dequantize_nf4" in str(func):
                sizes.append(out.numel())
            return out

    with Watch():
        module(torch.tensor([7, 4000, 7]))
    assert sizes == [3 * 64]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.up = nn.Linear(64, 64)
        self.lm_head = nn.Linear(64, 96)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.up(self.embed(ids)))


def test_fake_rows() -> None:
    table = Embedding4bit.from_embedding(nn.Embedding(10, 64))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert table(torch.zeros(2, 3, dtype=torch.int64)).shape == (2, 3, 64)


def test_a_tied_head_runs_on_the_table() -> None:
    model = quantize_model(Tied(), embeddings=True)
    assert isinstance(model.embed, Embedding4bit)
    assert type(model.lm_head) is TiedLinear4bit
    assert model.lm_head.weight is model.embed.weight
    x = torch.randn(3, 64, requires_grad=True)
    expected = nn.functional.linear(x, model.embed.dequantize(), model.lm_head.bias)
    torch.testing.assert_close(model.lm_head(x), expected, rtol=1e-5, atol=1e-5)
    model.lm_head(x).sum().backward()
    assert x.grad is not None
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to(torch.float32)):
        assert other.lm_head.weight is other.embed.weight
        assert other.lm_head.absmax is other.embed.absmax
        ids = torch.arange(5)
        assert torch.equal(other(ids), model(ids))
    assert [name for name in model.state_dict() if name.startswith("lm_head")] == ["lm_head.weight", "lm_head.bias"]
    with pytest.raises(ValueError, match="tied to an embedding"):
        model.lm_head.set_weight(model.embed.weight4bit)


def test_tables_that_stay_dense_with_embeddings() -> None:
    model = quantize_model(Tied())
    assert (type(model.embed), type(model.lm_head)) == (nn.Embedding, nn.Linear)
    model = quantize_model(Tied(), skip=["embed"], embeddings=True)
    assert (type(model.embed), type(model.lm_head)) == (nn.Embedding, nn.Linear)
    untied = Tied()
    untied.lm_head = nn.Linear(64, 96)
    untied.twin = nn.Embedding(96, 64)
    untied.other = nn.Embedding(96, 64)
    untied.other.weight = untied.twin.weight
    model = quantize_model(untied, embeddings=True)
    assert (type(model.embed), type(model.lm_head)) == (Embedding4bit, nn.Linear)
    assert (type(model.twin), type(model.other)) == (nn.Embedding, nn.Embedding)
    untied = Tied()
    untied.lm_head = nn.Linear(64, 96)
    assert type(quantize_model(untied, skip=(), embeddings=True).lm_head) is Linear4bit
    assert isinstance(quantize_model(nn.Embedding(4, 8), embeddings=True), Embedding4bit)


def test_a_head_tied_to_an_exposed_table_has_its_weight() -> None:
    head = TiedLinear4bit(table())
    expected = head.dequantize()
    head.expose()
    assert torch.equal(head.dequantize(), expected)


def test_rows_that_are_scaled() -> None:
    """Gemma's embeddings multiply each row by a number in the dtype of the table."""
    gemma3 = pytest.importorskip("transformers.models.gemma3.modeling_gemma3", reason="transformers has no Gemma 3")
    dense = gemma3.Gemma3TextScaledWordEmbedding(40, 64, 0, embed_scale=640**0.5).bfloat16()
    packed = quantize_model(nn.Sequential(dense), embeddings=True)[0]
    back, ids = packed.to_dense(), torch.arange(40)
    assert (type(packed), type(back)) == (Embedding4bit, type(dense))
    for module in (packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(module(ids), back(ids))
    assert torch.equal(packed(ids), packed.dequantize() * torch.tensor(640**0.5).bfloat16())
