"""A 4-bit code is an argument: every operator on a packed weight computes with the given code.

The codec's and the linear operators' own tests run with each code (test_codec.py, test_encode_cpu.py,
test_linear_cpu.py, test_kernels_cpu.py, and their twins for CUDA). Here is what lies above them.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import qlora_ext
import reference
from grouped_samples import assert_like_single_experts, grouped_sample
from qlora_ext import _C, _library, formats
from qlora_ext.form import Form
from qlora_ext.merged_linear import merged_linear_nf4
from qlora_ext.merging.codes import merged_weight
from qlora_ext.weight import NF4Weight, Weight4bit, quantize
from samples import DEVICES, OPCHECKS, by_function, by_operator, by_python, linear_sample, relative_error

OPS = torch.ops.qlora
SHUFFLED = Form(code="shuffled")


def test_the_tables_are_those_of_the_oracle() -> None:
    assert tuple(code for code in reference.CODES if code != "shuffled") == formats.CODES  # made for tests: not listed
    for code, values in reference.CODES.items():
        got = np.array(_C.code_values(code), np.float32)
        assert np.array_equal(got.view(np.uint32), values.view(np.uint32))
    assert formats.BLOCK_SIZES == reference.BLOCK_SIZES


def test_every_operator_with_a_packed_weight_takes_the_form_last() -> None:
    for name in _library.OPERATORS:
        schema = getattr(OPS, name).default._schema
        names = [a.name for a in schema.arguments]
        encodes = schema.returns[0].name == "packed" or name == "search_absmax_nf4"
        last = ["code", "scale_table", "block_offsets", "offset_scale"]
        if "adapter_of_row" in names:  # the adapters of a call with several follow the form
            names = names[: names.index("adapter_of_row")]
        if "packed" in names:
            assert names[-4:] == last, name
        elif encodes:
            assert [n for n in names if n in last] == ["code"], name
        else:
            assert not set(last) & set(names), name


@pytest.mark.parametrize("device", [*DEVICES, "meta"])
def test_a_code_that_does_not_exist_is_named(device: str) -> None:
    s = linear_sample(device="cpu" if device == "meta" else device)
    to = "meta" if device == "meta" else device
    w, absmax, x = torch.ones(4, 64, device=to), torch.ones(4, device=to), s.x.to(to)
    packed = [a.to(to) if isinstance(a, torch.Tensor) else a for a in s.w4.operands()[:6]]
    dense = [None if t is None else t.to(to) for t in (s.bias, s.lora_a, s.lora_b)]
    calls = [
        lambda: OPS.quantize_nf4(w, 64, "fp8"),
        lambda: OPS.search_absmax_nf4(w, torch.ones(64, device=to), 64, "fp8"),
        lambda: OPS.encode_nf4(w, absmax, 64, None, None, "fp8"),
        lambda: OPS.encode_nf4_stochastic(w, absmax, 64, 0, "fp8"),
        lambda: OPS.dequantize_nf4(*packed, [48, 64], torch.float32, "fp8"),
        lambda: OPS.linear_nf4(x, *packed, 48, *dense, 1.0, 0.0, 0, None, "fp8"),
        lambda: OPS.linear_nf4_dx(torch.ones(5, 48, device=to), *packed, 64, *dense[1:], 1.0, 0.0, 0, None, "fp8"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="^code: expected nf4, .*, got fp8"):
            call()


def test_forms_and_weights_of_codes() -> None:
    with pytest.raises(ValueError, match="code: expected nf4, .*, got fp8"):
        Form(code="fp8")
    w4 = quantize(torch.randn(48, 64), SHUFFLED)
    assert type(w4) is Weight4bit
    assert w4.code == "shuffled"
    assert type(qlora_ext.quantize_nf4(torch.randn(48, 64))) is NF4Weight
    with pytest.raises(ValueError, match="code: expected nf4, got shuffled"):
        NF4Weight(**w4.fields)
    with pytest.raises(ValueError, match="got shuffled, which bitsandbytes lacks"):
        w4.to_bitsandbytes("weight")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", [by_operator, by_function, by_python], ids=lambda way: way.__name__)
def test_gradients_are_those_of_the_code(way, device: str) -> None:
    s = linear_sample(m=(2, 3), device=device, requires_grad=True, code="shuffled")
    y = way(s)
    assert relative_error(y, s.expected()) < 1e-6
    dy = torch.randn_like(y)
    y.backward(dy)
    assert relative_error(s.x.grad, s.expected_dx(dy)) < 1e-6


def test_opcheck_and_compile() -> None:
    s = linear_sample(m=(2, 3), requires_grad=True, code="shuffled")
    torch.library.opcheck(OPS.linear_nf4.default, s.args, test_utils=OPCHECKS)
    compiled = torch.compile(by_python, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(s), by_python(s))


def test_forward_mode_and_autocast_keep_the_code() -> None:
    s = linear_sample(m=3, rank=None, bias=False, code="shuffled")
    tangent = torch.randn_like(s.x)
    y, dy = torch.func.jvp(lambda x: OPS.linear_nf4(x, *s.args[1:]), (s.x,), (tangent,))
    assert torch.equal(y, by_operator(s))
    s.x = tangent
    assert torch.equal(dy, by_operator(s))
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(by_operator(s).float(), s.expected()) < 2e-2


@pytest.mark.parametrize("device", DEVICES)
def test_experts_have_their_code(device: str) -> None:
    assert_like_single_experts(grouped_sample([2, 0, 3], device=device, code="shuffled"))


def test_modules_hold_any_code() -> None:
    w, x = torch.randn(48, 64), torch.randn(3, 64)
    w4 = quantize(w, SHUFFLED)
    layer = qlora_ext.nn.Linear4bit(64, 48, bias=False, compute_dtype=torch.float32)
    layer.set_weight(w4)
    assert layer.form.code == "shuffled"
    assert torch.equal(layer.dequantize(torch.float32), w4.dequantize(torch.float32))
    assert torch.equal(layer(x), qlora_ext.linear_nf4(x, w4))
    assert layer.quantize(w).code == "shuffled"
    table = qlora_ext.nn.Embedding4bit(48, 64, compute_dtype=torch.float32)
    table.set_weight(w4)
    ids = torch.tensor([3, 47, 0])
    assert torch.equal(table(ids), w4.dequantize(torch.float32)[ids])


def test_an_adapter_is_merged_into_codes_of_the_weight() -> None:
    w4 = quantize(torch.randn(48, 64), SHUFFLED)
    a, b = 0.04 * torch.randn(8, 64), 0.04 * torch.randn(48, 8)
    merged = merged_weight(w4, a.requires_grad_(), b.requires_grad_(), 1.0)
    assert merged.code == "shuffled"
    x = torch.randn(3, 64, requires_grad=True)
    y = merged_linear_nf4(x, merged, None, a, b, 1.0)
    y.sum().backward()
    dense = merged.dequantize(torch.float32)
    assert relative_error(y, (x @ dense.T).detach().double().numpy()) < 1e-6
    assert relative_error(x.grad, dense.sum(0).expand(3, 64).double().numpy()) < 1e-6


def test_calibration_encodes_to_the_code() -> None:
    w, x = torch.randn(32, 64), torch.randn(500, 64) @ torch.randn(64, 64)
    moments = x.T @ x / len(x)
    feedback = qlora_ext.calibration.Feedback.of(moments)
    found = qlora_ext.calibration.encode(w, moments, feedback, quantize(w, SHUFFLED))
    assert found.weight.code == "shuffled"
    assert found.error < found.absmax_error
