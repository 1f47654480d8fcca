"""A 4-bit weight is a tensor: reading gives its decoded values, writing is an error, and copies keep its bits."""

from __future__ import annotations

import copy
import io
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

import qlora_ext
import tensors
from forms import MODULE_FORMS as FORMS
from forms import random_weight
from qlora_ext.nn import Embedding4bit, Linear4bit
from qlora_ext.weight import TENSORS, NF4Weight, Weight4bit

DATA = pathlib.Path(__file__).parents[1] / "data"
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[3, 31, 0], [31, 7, 3]])
EVERY = pytest.mark.parametrize("name", FORMS)


def weight() -> NF4Weight:
    torch.manual_seed(0)
    return qlora_ext.quantize_nf4(torch.randn(32, 64))


def same_bits(a: Weight4bit, b: Any) -> bool:
    same_kind = (type(a), a.shape, a.dtype, a.form) == (type(b), b.shape, b.dtype, b.form)
    return same_kind and tensors.same_bits(a.tensors, b.tensors)


def saved(value: Any, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


# Reading

READING: dict[str, Callable[[Any], Any]] = {
    "matmul": lambda w: w @ X.T,
    "transposed": lambda w: X @ w.T,
    "addmm": lambda w: torch.addmm(torch.ones(32), X, w.t()),
    "einsum": lambda w: torch.einsum("ij,kj->ik", X, w),
    "sum": lambda w: w.sum(0),
    "norm": lambda w: torch.linalg.vector_norm(w, dim=1),
    "singular values": lambda w: torch.linalg.svdvals(w),
    "arithmetic": lambda w: 1 - 2 * w / 3,
    "row": lambda w: w[3],
    "columns": lambda w: w[:, 8:24],
    "mask": lambda w: w[w > 0],
    "cat": lambda w: torch.cat([w, w]),
    "where": lambda w: torch.where(w > 0, w, 0),
    "take": lambda w: w.take(IDS),
    "gather": lambda w: w.index_select(0, IDS[0]),
    "float64": lambda w: w.double() * 3,
    "integers": lambda w: (w * 100).to(torch.int32),
    "bits": lambda w: w.view(torch.int32),
    "flat": lambda w: w.view(-1),
    "reshape": lambda w: w.reshape(64, 32),
    "batched": lambda w: torch.bmm(w[None], X.T[None]),
    "as an operand of add_": lambda w: torch.zeros(32, 64).add_(w),
    "as the source of copy_": lambda w: torch.zeros(32, 64).copy_(w),
    "as a value": lambda w: torch.zeros(32, 64).index_put((IDS[0],), w[:3]),
    "vmap": lambda w: torch.vmap(lambda row: row.sum())(w),
    "embedding_bag": lambda w: F.embedding_bag(IDS, w),
    "compiled": lambda w: torch.compile(lambda a: (2 * a.T).sum(0), backend="aot_eager", fullgraph=True)(w),
}


@pytest.mark.parametrize("use", READING)
def test_reading_gives_the_decoded_values(use: str) -> None:
    w4 = weight()
    found, expected = READING[use](w4), READING[use](w4.dequantize())
    assert not isinstance(found, Weight4bit)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_it_converts_like_a_tensor() -> None:
    w4 = weight()
    decoded = w4.dequantize()
    assert np.array_equal(np.asarray(w4), decoded.numpy())
    assert np.array_equal(w4.numpy(), decoded.numpy())
    for array in (w4.numpy(), np.asarray(w4)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    assert w4.tolist() == decoded.tolist()
    assert torch.equal(torch.from_dlpack(w4), decoded)
    assert w4[1, 2].item() == decoded[1, 2].item()
    assert torch.equal(w4, decoded)
    assert not torch.equal(w4, decoded + 1)
    assert len(w4) == len([*w4]) == 32
    assert {w4: 1}[w4] == 1
    assert repr(w4) == f"{w4}"


@EVERY
def test_sizes_are_logical_and_bytes_are_those_of_the_codes(name: str) -> None:
    w4 = random_weight(FORMS[name], (24, 160), dtype=torch.float16)
    assert isinstance(w4, Tensor)
    assert (w4.shape, w4.dtype, w4.ndim, w4.stride()) == ((24, 160), torch.float16, 2, (160, 1))
    assert w4.numel() == w4.nelement() == 24 * 160
    assert w4.nbytes == sum(t.nbytes for t in w4.tensors.values()) < 24 * 160 * w4.form.bits / 4
    assert w4.numel() * w4.element_size() == w4.numel() * w4.itemsize == w4.nbytes
    assert w4.is_contiguous()
    assert w4.is_floating_point()
    assert (w4.requires_grad, w4.is_leaf, w4.grad) == (False, True, None)


# Writing

WRITING: dict[str, Callable[[Any], Any]] = {
    "mul_": lambda w: w.mul_(2),
    "iadd": lambda w: w.__iadd__(1),
    "clamp_": lambda w: w.clamp_(0, 3),
    "item": lambda w: w.__setitem__(0, 1.0),
    "data": lambda w: w.data.lerp_(torch.zeros(32, 64), 0.1),
    "foreach": lambda w: torch._foreach_mul_([w.detach()], 2),
    "copy_": lambda w: w.copy_(torch.zeros(32, 64)),
    "set data": lambda w: setattr(w, "data", torch.zeros(32, 64)),
    "set_": lambda w: w.set_(torch.zeros(32, 64)),
    "out": lambda w: torch.mul(X[:1].expand(32, 64), 2, out=w),
    "init": nn.init.normal_,
    "average": lambda w: w.data.copy_(0.9 * w.data + 0.1 * torch.ones(32, 64)),
    "a row": lambda w: w[0].mul_(2),
    "an element of a row": lambda w: w[0].__setitem__(0, 1.0),
    "rows": lambda w: w[2:4].mul_(2),
    "the transposed": lambda w: w.T.add_(1),
    "transposing": lambda w: w.t_(),
    "resizing": lambda w: w.resize_(3),
    "max_norm": lambda w: F.embedding(IDS, w, max_norm=0.1),
    "gradient": lambda w: setattr(w, "grad", torch.zeros(32, 64)),
    "training": lambda w: w.requires_grad_(True),
    "training by an attribute": lambda w: setattr(w, "requires_grad", True),
    "compiled": lambda w: torch.compile(lambda a: a.mul_(2), backend="aot_eager")(w),
}


@pytest.mark.parametrize("use", WRITING)
def test_writing_is_an_error_and_changes_nothing(use: str) -> None:
    parameter = nn.Parameter(weight())
    before = parameter.detach().clone()
    with torch.no_grad(), pytest.raises(RuntimeError, match="a 4-bit weight is frozen; train an adapter, or replace"):
        WRITING[use](parameter)
    assert same_bits(before, parameter)
    assert not parameter.requires_grad


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w.mul_(1),
        lambda w: w.clamp_(-100, 100),
        lambda w: w.lerp_(w, 0.1),
        lambda w: w.copy_(w.dequantize()),
        lambda w: w.data.add_(0),
        lambda w: w.copy_(0.9 * w + 0.1 * w),
        lambda w: torch._foreach_lerp_([w], [w.clone()], 0.1)[0],
        lambda w: w.requires_grad_(False),
        lambda w: w.copy_(w.clone()),
    ],
)
def test_writing_the_values_that_it_has_is_allowed(use: Callable[[Any], Any]) -> None:
    parameter = nn.Parameter(weight())
    before = parameter.detach().clone()
    assert isinstance(use(parameter), NF4Weight)
    assert same_bits(before, parameter)


def test_a_weight_of_the_same_form_can_be_copied_into_it() -> None:
    w4, other = weight(), qlora_ext.quantize_nf4(torch.randn(32, 64))
    packed = w4.packed
    w4.copy_(other)
    assert same_bits(w4, other)
    assert w4.packed is packed
    with pytest.raises(RuntimeError, match="copy_: a 4-bit weight is frozen"):
        w4.copy_(qlora_ext.quantize(torch.randn(32, 64), "mxfp4"))
    w4.data = third = qlora_ext.quantize_nf4(torch.randn(32, 64), 32)
    assert same_bits(w4, third)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"packed": [1]}, "packed: expected a tensor, got list"),
        ({"absmax": None}, "absmax: expected a tensor, got NoneType"),
        ({"dtype": torch.int8}, "dtype: expected a floating-point torch.dtype, got torch.int8"),
        ({"shape": [1.5]}, r"shape: expected a list of sizes, got \[1.5\]"),
        ({"code": "fp4"}, "code: expected nf4, got fp4"),
    ],
)
def test_wrong_parts_of_a_weight(changes: dict[str, Any], error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        weight().replace(**changes)


# Copies

COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "clone": torch.clone,
    "detach": lambda w: w.detach(),
    "data": lambda w: w.data,
    "parameter": nn.Parameter,
    "to": lambda w: w.to("cpu", copy=True),
    "cpu": lambda w: w.cpu(),
    "contiguous": lambda w: w.contiguous(),
    "view": lambda w: w.view(w.shape),
    "there and back": lambda w: w.double().half().to(w.dtype),
    "all rows": lambda w: w[:],
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "torch.save": saved,
}


@EVERY
def test_copies_keep_every_bit(name: str) -> None:
    w4 = random_weight(FORMS[name], (24, 160), dtype=torch.bfloat16)
    for way, copied in COPIES.items():
        found = copied(w4)
        assert same_bits(w4, found), way
        assert torch.equal(found, w4.dequantize()), way
    for copied in (copy.deepcopy, lambda w: saved(w, weights_only=False), lambda w: pickle.loads(pickle.dumps(w))):
        parameter = copied(nn.Parameter(w4))
        assert isinstance(parameter, nn.Parameter)
        assert same_bits(w4, parameter)
        assert parameter.packed.data_ptr() != w4.packed.data_ptr()


def test_weights_of_version_0_1_0_load() -> None:
    """They were no tensors, and in another module; see data/README.md."""
    for weights_only in (True, False):
        found = torch.load(DATA / "pickled_weights.pt", weights_only=weights_only)
        assert [type(w4) for w4 in found["weights"]] == [NF4Weight, Weight4bit]
        for w4, decoded in zip(found["weights"], found["decoded"], strict=True):
            assert w4.dtype == decoded.dtype
            assert torch.equal(w4, decoded)
    found = torch.load(DATA / "pickled_layer.pt", weights_only=False)
    assert torch.equal(found["layer"].weight, found["decoded"])
    assert found["layer"].weight_dtype == found["decoded"].dtype
    torch.testing.assert_close(found["layer"](X), found["layer"].to_linear()(X))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_cast_changes_only_the_dtype_of_the_decoded_values(dtype: torch.dtype) -> None:
    w4 = weight()
    cast = w4.to(dtype)
    assert same_bits(w4.replace(dtype=dtype), cast)
    assert torch.equal(cast, w4.dequantize(dtype))
    assert w4.dtype == torch.float32


def test_meta_and_empty() -> None:
    there = weight().to("meta")
    assert {t.device.type for t in (there, *there.tensors.values())} == {"meta"}
    assert (there @ torch.zeros(64, 3, device="meta")).shape == (32, 3)
    empty = torch.empty_like(there, device="cpu")
    assert (type(empty), empty.shape, empty.form) == (NF4Weight, (32, 64), weight().form)
    assert empty.dequantize().shape == (32, 64)
    assert type(torch.zeros_like(weight())) is Tensor


@EVERY
def test_whole_rows_are_weights_over_the_same_codes(name: str) -> None:
    w4 = random_weight(FORMS[name], (24, 128))
    parts = [w4[:8], *w4.split(8)[1:], *w4.chunk(3), *w4.split([16, 8])]
    for part, begin in zip(parts, (0, 8, 16, 0, 8, 16, 0, 16), strict=True):
        assert isinstance(part, Weight4bit)
        assert part.packed.data_ptr() == w4.packed[begin:].data_ptr()
        torch.testing.assert_close(part.dequantize(), w4.dequantize()[begin : begin + len(part)])
    stack = Weight4bit.stack([w4, random_weight(FORMS[name], (24, 128), seed=1)])
    assert [torch.equal(e, m.dequantize()) for e, m in zip(stack, stack.unbind(), strict=True)] == [True, True]
    assert same_bits(stack[0], w4)
    assert same_bits(stack[:1], Weight4bit.stack([w4]))


def test_rows_that_share_a_block_are_decoded() -> None:
    w4 = qlora_ext.quantize_nf4(torch.randn(8, 32))
    assert type(w4[:2]) is NF4Weight
    assert not isinstance(w4[:3], Weight4bit)
    assert torch.equal(w4[:3], w4.dequantize()[:3])


# Layers


def linear() -> nn.Linear:
    """A layer of torch with a 4-bit weight."""
    layer = nn.Linear(64, 32)
    layer.weight = nn.Parameter(weight())
    return layer


def linear4bit() -> Linear4bit:
    layer = Linear4bit(64, 32, compute_dtype=torch.float32)
    layer.set_weight(weight())
    return layer


LAYERS = pytest.mark.parametrize("layer_of", [linear, linear4bit])


@LAYERS
def test_a_layer_runs_on_the_codes(layer_of: Callable[[], nn.Linear]) -> None:
    layer = layer_of().requires_grad_(False)
    x = X.clone().requires_grad_()
    expected = qlora_ext.linear_nf4(x, weight(), layer.bias)
    with FlopCounterMode(display=False) as counted:
        y = layer(x)
    assert torch.equal(y, expected)
    assert counted.get_total_flops() == 2 * 3 * 64 * 32
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    (expected_dx,) = torch.autograd.grad(expected.square().sum(), x)
    assert torch.equal(dx, expected_dx)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    (compiled_dx,) = torch.autograd.grad(compiled(x).square().sum(), x)
    assert torch.equal(compiled_dx, dx)
    assert torch.equal(torch.func.vmap(layer)(x), y)
    assert torch.equal(torch.func.functional_call(layer, dict(layer.named_parameters()), (x,)), y)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    assert layer.half()(x.half()).dtype == layer.weight.dtype == torch.float16
    assert same_bits(layer.float().weight, weight())
    assert layer.to("meta").to_empty(device="cpu").weight.shape == (32, 64)


@LAYERS
def test_a_state_is_saved_and_loaded(layer_of: Callable[[], nn.Linear]) -> None:
    layer, other = layer_of(), layer_of()
    layer.weight = nn.Parameter(qlora_ext.quantize_nf4(torch.randn(32, 64)))
    for assign in (False, True):
        other.load_state_dict(saved(layer.state_dict()), assign=assign)
        assert same_bits(other.weight, layer.weight)
        assert torch.equal(other(X), layer(X))
    if layer_of is linear4bit:
        assert {type(t) for t in layer.state_dict().values()} == {Tensor}
        parts = {"weight": "packed"} | {name: name for name in TENSORS[1:]}
        state = {key: t for key, t in layer.state_dict().items() if key != "bias"}
        assert all(torch.equal(t, layer.weight.tensors[parts[key]]) for key, t in state.items())


@LAYERS
def test_optimizers_leave_it_alone(layer_of: Callable[[], nn.Linear]) -> None:
    layer = layer_of()
    layer.bias.requires_grad_()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    layer(X).square().sum().backward()
    nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    vector = nn.utils.parameters_to_vector(layer.parameters())
    assert vector.numel() == 32 * 64 + 32
    nn.utils.vector_to_parameters(vector, layer.parameters())
    assert same_bits(layer.weight, weight())


def test_rows_of_an_embedding() -> None:
    table = nn.Embedding(32, 64, padding_idx=0)
    table.weight = nn.Parameter(weight())
    assert torch.equal(table(IDS), weight().dequantize()[IDS])
    assert torch.equal(F.embedding(IDS, weight()), weight().dequantize()[IDS])
    with pytest.raises(IndexError, match="rows: expected row numbers from 0 to 31, got 32 to 32"):
        table(torch.tensor([32]))


class Double(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


COMPUTED: dict[str, Callable[[Any], Any]] = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "parametrized": lambda layer: parametrize.register_parametrization(layer, "weight", Double()),
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("way", COMPUTED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_a_weight_that_is_computed_from_it(way: str) -> None:
    """The decoded values are normalized or pruned, in a layer of torch. Our layers reject it."""
    dense = nn.Linear(64, 32)
    dense.weight = nn.Parameter(weight().dequantize())
    layer = linear()
    layer.bias = dense.bias
    for each in (layer, dense):
        torch.manual_seed(0)
        COMPUTED[way](each)
    torch.testing.assert_close(layer.eval()(X), dense.eval()(X))
    with pytest.raises(RuntimeError, match="weight: expected a weight that is a parameter of this Linear4bit"):
        COMPUTED[way](linear4bit())


def test_our_layers_reject_a_dense_weight() -> None:
    layer, dense = linear4bit(), torch.zeros(32, 64)
    expected = r"weight: expected a 4-bit weight in a Linear4bit, got a dense one, torch.float32 \[32, 64\]"
    with pytest.raises(TypeError, match=expected):
        torch.func.functional_call(layer, {"weight": dense}, (X,))
    layer.weight = nn.Parameter(dense)
    with pytest.raises(TypeError, match=expected):
        layer(X)


# Averages


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = Embedding4bit.from_embedding(nn.Embedding(16, 64))
        self.frozen = linear4bit()
        self.plain = linear()
        self.trained = nn.Linear(32, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        y: Tensor = self.trained(self.frozen(x) + self.plain(x))
        return y


AVERAGES: dict[str, Any] = {
    "SWA": {},
    **{f"EMA {d}": {"multi_avg_fn": get_ema_multi_avg_fn(d)} for d in (0.9, 0.95, 0.999, 0.9999)},
    "EMA one by one": {"avg_fn": get_ema_avg_fn(0.9)},
    "with buffers": {"multi_avg_fn": get_ema_multi_avg_fn(0.9), "use_buffers": True},
}


@pytest.mark.parametrize("average", AVERAGES)
def test_an_average_is_one_of_the_trained_weights(average: str) -> None:
    torch.manual_seed(0)
    model, ids = Model(), torch.arange(16)
    averaged = AveragedModel(model, **AVERAGES[average])
    expected = AveragedModel(model.trained, **AVERAGES[average])
    for _ in range(10):
        with torch.no_grad():
            model.trained.weight += 0.1
        averaged.update_parameters(model)
        expected.update_parameters(model.trained)
    assert torch.equal(averaged.module.trained.weight, expected.module.weight)
    for name in ("table", "frozen", "plain"):
        ours, theirs = (m.get_submodule(name).weight for m in (averaged.module, model))
        assert same_bits(ours, theirs)
        assert ours.packed.data_ptr() != theirs.packed.data_ptr()
    model.trained = averaged.module.trained
    assert torch.allclose(averaged(ids), model(ids))


def test_an_average_of_other_weights_is_an_error() -> None:
    model = Model()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(model)
    model.frozen.set_weight(qlora_ext.quantize_nf4(torch.randn(32, 64)))
    with pytest.raises(RuntimeError, match="_foreach_lerp_: a 4-bit weight is frozen"):
        averaged.update_parameters(model)


def test_the_key_in_torchs_cache_of_graphs_is_that_of_the_layout() -> None:
    w4 = weight()
    keys = [w4, w4.half(), w4[:16], qlora_ext.quantize_nf4(w4.dequantize(), 32), qlora_ext.quantize(w4.float(), "fp4")]
    assert len({w._stable_hash_for_caching() for w in keys}) == len(keys)
    assert qlora_ext.quantize_nf4(torch.randn(32, 64))._stable_hash_for_caching() == w4._stable_hash_for_caching()


def test_onnx_export_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.onnx.export, which needs onnxscript, traces a module, and decomposes a program."""
    module = nn.Sequential(linear4bit())
    program = torch.export.export(module, (X,))
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    for trace in (lambda: torch.export.export(module, (X,)), program.run_decompositions):
        with pytest.raises(ValueError, match="ONNX export of 4-bit layers is not supported"):
            trace()
