"""Modules hold a weight of any form: they compute with it, and keep, move, save and load its bits."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import qlora_ext
from forms import MODULE_FORMS as FORMS
from forms import oracle, random_weight
from qlora_ext import formats
from qlora_ext._internal import bit_planes
from qlora_ext.form import Form
from qlora_ext.nn import Embedding4bit, Experts4bit, ExpertsLora, Linear4bit, Packed4bit, TiedLinear4bit
from qlora_ext.weight import TENSORS, Weight4bit
from tensors import same_bits
from tiny_experts import Experts, routing

EVERY = pytest.mark.parametrize("name", FORMS)
KINDS = ("linear", "embedding", "experts", "odd linear", "odd embedding")
every_kind = pytest.mark.parametrize("kind", KINDS)
SHAPE = (24, 160)  # rows do not hold whole blocks of 64 or 128
IDS = torch.tensor([[3, 10, 0], [10, 7, 3]])
ROUTED = torch.tensor([[0, 1], [4, 0], [2, 3]])
X = torch.randn(11, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Transposed(Experts):
    has_bias, is_transposed = True, True


def layer_of(w4: Weight4bit, bias: bool = False) -> Linear4bit:
    n, k = w4.shape
    layer = Linear4bit(k, n, bias, torch.float32, **w4.form.keywords)
    layer.set_weight(w4)
    return layer


def empty(kind: str, form: Form, **options: Any) -> Packed4bit:
    n, k = (23, 33 if form.bits == 4 else 96) if kind.startswith("odd") else SHAPE
    torch.manual_seed(0)  # the bias of experts
    if kind == "experts":
        return Experts4bit(Transposed(inner=48 if form.bits == 4 else 64), torch.float64, **form.keywords, **options)
    if "embedding" in kind:
        return Embedding4bit(n, k, compute_dtype=torch.float32, **form.keywords, **options)
    return Linear4bit(k, n, False, torch.float32, **form.keywords, **options)


def filled(kind: str, name: str) -> Packed4bit:
    module = empty(kind, FORMS[name])
    for seed, (weight, shape) in enumerate(module.packed_shapes.items()):
        module.set_packed(weight, random_weight(FORMS[name], shape, seed))
    return module


def input_of(kind: str, module: Any) -> Tensor:
    if "embedding" in kind:
        return IDS
    return X[:3].clone() if kind == "experts" else torch.ones(3, module.in_features)


def outputs(kind: str, module: Any, x: Tensor | None = None) -> Tensor:
    x = input_of(kind, module) if x is None else x
    return module(x, ROUTED, ROUTED.double() / 5) if kind == "experts" else module(x)


@EVERY
def test_a_weight_has_the_tensors_of_its_form(name: str) -> None:
    form = FORMS[name]
    for shape in (SHAPE, (3, *SHAPE)):
        w4 = random_weight(form, shape)
        assert w4.form == form
        assert Form.of(**form.keywords) == form
        specs = form.tensors(SHAPE, shape[:-2])
        assert {key: (tuple(t.shape), t.dtype) for key, t in w4.tensors.items()} == specs
    assert [key for key in TENSORS if key in specs] == [*specs]


@EVERY
def test_it_decodes_as_specified(name: str) -> None:
    w4 = random_weight(FORMS[name], SHAPE)
    expected = oracle(w4)
    assert np.array_equal(w4.dequantize(torch.float32).numpy(), expected)
    # the decoded scales and offsets are the ones that the operator uses
    table = torch.tensor(formats.code_values(w4.code))
    codes = bit_planes.unpack(w4.packed, w4.form.bits).reshape(-1).long()
    blocks = torch.arange(codes.numel()) // w4.block_size
    values = table[codes] * w4.decoded_scales()[blocks]
    offsets = w4.decoded_offsets()
    if "zero points" in name:  # (value - zero point) * scale, rounded once
        np.testing.assert_allclose((values + offsets[blocks]).numpy(), expected.reshape(-1), rtol=0, atol=2e-8)
    else:
        assert np.array_equal((values if offsets is None else values + offsets[blocks]).numpy(), expected.reshape(-1))
    w = torch.randn(w4.shape)
    less = w if offsets is None else w - offsets[blocks].view(w.shape)
    assert torch.equal(w4.without_offsets(w), less)
    stack = Weight4bit.stack([w4, random_weight(FORMS[name], SHAPE, seed=1)])
    assert torch.equal(stack.dequantize(), torch.stack([stack.matrix(e).dequantize() for e in range(2)]))
    assert torch.equal(stack.decoded_scales()[0], w4.decoded_scales())
    if offsets is not None:
        assert torch.equal(stack.decoded_offsets()[0], offsets)


@EVERY
def test_a_layer_computes_with_it(name: str) -> None:
    w4 = random_weight(FORMS[name], SHAPE)
    layer, x = layer_of(w4), torch.randn(5, SHAPE[1], dtype=torch.float64, requires_grad=True)
    layer.compute_dtype = torch.float64
    a, b = torch.randn(4, SHAPE[1]).double().requires_grad_(), torch.randn(SHAPE[0], 4).double().requires_grad_()
    y = layer.fused_forward(x, a, b, 0.5)
    dense = torch.tensor(oracle(w4)).double()
    torch.testing.assert_close(y, x @ dense.T + 0.5 * x @ a.T @ b.T, rtol=1e-12, atol=1e-12)
    dx, da, db = torch.autograd.grad(y.sum(), [x, a, b])
    ones = torch.ones_like(y)
    torch.testing.assert_close(dx, ones @ dense + 0.5 * ones @ b @ a, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(da, 0.5 * (ones @ b).T @ x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(db, 0.5 * ones.T @ (x @ a.T), rtol=1e-12, atol=1e-12)


@EVERY
def test_exposed_parameters_are_what_has_an_entry_per_block(name: str) -> None:
    layer = layer_of(random_weight(FORMS[name], SHAPE))
    state, blocks = layer.packed_state(), layer.absmax.numel()
    assert {key for key in TENSORS[1:] if getattr(layer, key) is not None} == {*state} - {"weight"}
    assert [key for key, _ in layer.named_parameters()] == ["weight"]
    assert not [*layer.buffers()]
    layer.expose()
    for key, t in layer.packed_state().items():
        assert (key in dict(layer.named_parameters())) == (key == "weight" or t.shape == (blocks,)), key
        assert not t.requires_grad
    assert same_bits(layer.packed_state(), state)
    layer.join()
    assert [key for key, _ in layer.named_parameters()] == ["weight"]
    assert same_bits(layer.packed_state(), state)


def saved_and_loaded(value: Any, weights_only: bool = False) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "there and back": lambda m: m.bfloat16().to("cpu").float(),
    "to": lambda m: m.to(dtype=torch.bfloat16, memory_format=torch.contiguous_format),
    "type": lambda m: m.type(torch.float16),
    "modes": lambda m: m.requires_grad_(False).train().eval(),
    "apply": lambda m: m.apply(lambda sub: getattr(sub, "reset_parameters", int)()),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": saved_and_loaded,
    "shared memory": lambda m: m.share_memory(),
}


@EVERY
@every_kind
def test_nothing_changes_its_bits(kind: str, name: str) -> None:
    before = filled(kind, name)
    for what, change in CHANGES.items():
        original = filled(kind, name)
        original.activations = "int8"
        module = change(original)
        assert module.activations == "int8", what
        assert module.form == FORMS[name], what
        assert same_bits(module.packed_state(), before.packed_state()), what
        assert {type(module.packed_weight(weight).absmax) for weight in module.packed_shapes} == {Tensor}, what


@EVERY
@every_kind
@pytest.mark.parametrize(("device", "assign"), [("cpu", False), ("cpu", True), ("meta", True)])
def test_its_state_loads_strictly(kind: str, name: str, device: str, assign: bool) -> None:
    module, new = filled(kind, name), empty(kind, FORMS[name], device=device)
    new.load_state_dict(saved_and_loaded(module.state_dict(), weights_only=True), assign=assign)
    assert same_bits(new.state_dict(), module.state_dict())
    assert torch.equal(outputs(kind, new), outputs(kind, module))


@EVERY
@every_kind
def test_its_state_loads_into_the_same_form_only(kind: str, name: str) -> None:
    module = filled(kind, name)
    state = module.state_dict()
    for other, form in FORMS.items():
        wants = empty(kind, form)
        has, needs = ({k: (t.shape, t.dtype) for k, t in m.packed_state().items()}.items() for m in (module, wants))
        if has == needs:
            continue
        before = {key: t.clone() for key, t in wants.packed_state().items()}
        only_lacks = has < needs  # what is there fits
        with pytest.raises(RuntimeError, match="Missing key" if only_lacks else f"packed state of a weight .*{form}"):
            pytest.fail(f"{other}: {wants.load_state_dict(state)}")
        if not only_lacks:
            for assign in (False, True):
                with pytest.raises(RuntimeError, match=f"packed state of a weight .*{form}"):
                    wants.load_state_dict(state, strict=False, assign=assign)
            assert same_bits(wants.packed_state(), before)


def test_the_error_names_the_form_that_was_expected() -> None:
    layer = Linear4bit(64, 32, code="e2m1", scales="table8", block_size=32)
    state = layer_of(random_weight(FORMS["q4_1"], (32, 64))).state_dict()
    expected = "the packed state of a weight [32, 64] with code=e2m1, block_size=32, scales=table8"
    with pytest.raises(RuntimeError) as error:
        layer.load_state_dict(state)
    assert f"absmax: expected torch.uint8 [64], {expected}; got torch.float16 [64]" in str(error.value)
    with pytest.raises(ValueError, match=r"block_offsets: expected .*scales=table8, which has no block_offsets"):
        layer.check_form({"block_offsets": state["block_offsets"]})


def test_nf4_states_have_the_names_they_had() -> None:
    names = {"weight", "absmax", "bias", "nested_absmax", "nested_offset"}
    assert {*layer_of(random_weight(Form(), SHAPE), bias=True).state_dict()} == names
    assert {*layer_of(random_weight(FORMS["nf4 alone"], SHAPE)).state_dict()} == {"weight", "absmax"}


@pytest.mark.parametrize(
    ("name", "width"),
    [(n, width) for n, form in FORMS.items() for width in (160, 96, 33) if width % form.row_unit == 0],
)
def test_rows_of_a_table(name: str, width: int) -> None:
    w4 = random_weight(FORMS[name], (11, width))
    table = Embedding4bit(11, width, compute_dtype=torch.float32, **w4.form.keywords)
    table.set_weight(w4)
    assert torch.equal(table(IDS), w4.dequantize()[IDS])


@EVERY
def test_a_tied_head_shares_every_tensor(name: str) -> None:
    w4 = random_weight(FORMS[name], (11, 64))
    table = Embedding4bit(11, 64, compute_dtype=torch.float32, **w4.form.keywords)
    table.set_weight(w4)
    head, x = TiedLinear4bit(table), torch.randn(3, 64)
    assert same_bits(head.weight4bit.tensors, w4.tensors)
    torch.testing.assert_close(head(x), x @ w4.dequantize().T)


@EVERY
def test_experts_compute_with_it(name: str) -> None:
    experts = filled("experts", name)
    dense, routed = experts.to_experts(torch.float32).double(), routing()
    torch.testing.assert_close(experts(X, *routed), dense(X, *routed))
    n = experts.packed_shapes["gate_up_proj"][1]
    lora = ExpertsLora(torch.randn(5, 4, 64).double(), torch.randn(5, n, 4).double().requires_grad_())
    y = experts(X, *routed, {"gate_up_proj": lora})
    y.sum().backward()
    with torch.no_grad():
        dense.gate_up_proj += (lora.b @ lora.a).mT
    torch.testing.assert_close(y, dense(X, *routed))
    assert lora.b.grad.isfinite().all()
    assert lora.b.grad.any()


@pytest.mark.parametrize(
    ("kind", "name"), [*(("linear", name) for name in FORMS), ("embedding", "nf4"), ("experts", "nf4")]
)
def test_a_compiled_module(kind: str, name: str) -> None:
    torch._dynamo.reset()  # each form compiles the same functions anew
    module = filled(kind, name)
    x = input_of(kind, module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    if kind == "embedding":
        assert torch.equal(compiled(x), module(x))
        return
    x.requires_grad_()
    expected, y = outputs(kind, module, x), outputs(kind, compiled, x)
    assert torch.equal(y, expected)
    assert torch.equal(*(torch.autograd.grad(out.sum(), x)[0] for out in (y, expected)))


@pytest.mark.parametrize("code", [[*range(-8, 8)], torch.arange(-8.0, 8.0), (*map(float, range(-8, 8)),)])
def test_values_name_their_code(code) -> None:
    assert Linear4bit(64, 32, code=code, scales="float16").form == Form("int4", "float16")


def test_made_up_codes_carry_their_values() -> None:
    values = torch.linspace(-1, 1, 16)
    name = formats.code_name(values)
    assert name.startswith("0x")
    assert len(name) == 130
    assert formats.code_values(name) == tuple(values.tolist())
    assert Form.of(code=values) == Form(name)
    negative_zero = [*formats.code_values("int4")]
    negative_zero[8] = -0.0
    assert formats.code_name(negative_zero) != "int4"  # it decodes to other bits


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ([1.0] * 15, "expected 16 values, got shape \\[15\\]"),
        ([0.0] * 16, "expected a value other than 0, got 16 zeros"),
        ([float("nan")] * 16, "expected 16 finite float32 values"),
        ([1e39] * 16, "expected 16 finite float32 values"),
        (3, "expected 16 values, got shape \\[\\]"),
        (object(), "expected a name or 16 numbers"),
        ("0x3f80", "0x and the 128 hexadecimal digits"),
        ("0x" + "7fc00000" * 16, "expected 16 finite float32 values"),
        ("nf5", "expected nf4, fp4"),
    ],
)
def test_invalid_codes_are_rejected(code, message: str) -> None:
    with pytest.raises(ValueError, match=f"^code: .*{message}"):
        Linear4bit(64, 32, code=code)


@pytest.mark.parametrize("keywords", [{"scales": "float8"}, {"offsets": "nested8"}, {"offsets": 1}])
def test_invalid_forms_are_rejected(keywords: dict) -> None:
    (key,) = keywords
    with pytest.raises(ValueError, match=f"^{key}: expected "):
        Linear4bit(64, 32, **keywords)


def test_a_description_names_what_matters() -> None:
    assert str(Form()) == "block_size=64, double_quant=True"
    assert str(FORMS["mxfp4"]) == "code=e2m1, block_size=32, scales=table8"
    assert str(FORMS["q4_k"]) == (
        "code=uint4, block_size=32, scales=nested_table8, offsets=scaled8, nested_block_size=8"
    )
    assert "code=e2m1, block_size=32, scales=table8" in repr(layer_of(random_weight(FORMS["mxfp4"], SHAPE)))
    assert "code=e2m1, block_size=32, scales=table8" in repr(random_weight(FORMS["mxfp4"], SHAPE))


def test_bitsandbytes_has_no_such_form() -> None:
    w4 = random_weight(Form("nf4", "float16"), SHAPE)
    with pytest.raises(ValueError, match="scales: expected float32 or nested8 without offsets"):
        w4.to_bitsandbytes("weight")


def test_a_layer_takes_over_the_form_of_its_weight() -> None:
    layer = qlora_ext.nn.Linear4bit(SHAPE[1], SHAPE[0], False)
    for name in (*FORMS, *reversed(FORMS)):
        w4 = random_weight(FORMS[name], SHAPE)
        layer.set_weight(w4)
        assert layer.form == FORMS[name]
        assert same_bits(layer.packed_state(), {"weight" if k == "packed" else k: t for k, t in w4.tensors.items()})
