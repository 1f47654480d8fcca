"""NF4Weight and the quantize/dequantize entry points: golden vectors, errors, device moves."""

from __future__ import annotations

import gc
import json
import pathlib
import weakref
from typing import Any

import numpy as np
import pytest
import torch

import qlora_ext
import reference
from qlora_ext.weight import NF4Weight
from samples import DEVICES

DATA = pathlib.Path(__file__).parents[1] / "data"
GOLDEN = np.load(DATA / "bitsandbytes_nf4.npz")
CASES = json.loads((DATA / "bitsandbytes_nf4.json").read_text())["cases"]


def golden(case: dict, field: str) -> torch.Tensor:
    key = f"{case['name']}.{field}"
    if key in GOLDEN:
        return torch.from_numpy(GOLDEN[key])
    return torch.from_numpy(GOLDEN[key + "@bf16"]).view(torch.bfloat16)


def golden_weight(case: dict) -> torch.Tensor:
    return golden(case, "w").reshape(case["shape"])


def zeros() -> NF4Weight:
    return qlora_ext.quantize_nf4(torch.zeros(8, 64))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_packed_bytes_and_scales_are_those_of_bitsandbytes(case: dict, device: str) -> None:
    w4 = qlora_ext.quantize_nf4(golden_weight(case).to(device), case["blocksize"], double_quant=False)
    assert torch.equal(w4.packed.cpu().reshape(-1), golden(case, "packed").reshape(-1))
    if not case["dq"]:
        assert torch.equal(w4.absmax.cpu(), golden(case, "absmax").reshape(-1))
        assert torch.equal(w4.dequantize(torch.float32).cpu(), golden(case, "deq_f32").reshape(case["shape"]))
        assert torch.equal(w4.dequantize(torch.bfloat16).cpu(), golden(case, "deq_bf16").reshape(case["shape"]))


@pytest.mark.parametrize("device", DEVICES)
def test_nested_scales_decode_as_in_bitsandbytes(device: str) -> None:
    case = next(c for c in CASES if c["dq"])
    parts = [golden(case, f).reshape(-1).to(device) for f in ("absmax_q", "nested_absmax", "offset")]
    decoded = torch.ops.qlora.dequantize_nf4(
        golden(case, "packed").reshape(-1).to(device), *parts, 64, 256, case["shape"], torch.bfloat16
    )
    assert torch.equal(decoded.cpu(), golden(case, "deq_bf16").reshape(case["shape"]))


def test_double_quantization_is_at_least_as_near_as_bitsandbytes() -> None:
    case = next(c for c in CASES if c["dq"])
    _, absmax = reference.quantize_nf4(golden_weight(case).float().numpy())
    theirs = reference.dequantize_absmax(
        *(golden(case, f).numpy().reshape(-1) for f in ("absmax_q", "nested_absmax")), golden(case, "offset").item()
    )
    w4 = qlora_ext.quantize_nf4(golden_weight(case))
    ours = torch.ops.qlora.dequantize_absmax(w4.absmax, w4.nested_absmax, w4.nested_offset, 256).numpy()
    assert np.abs(ours - absmax).mean() <= np.abs(theirs - absmax).mean()
    assert np.abs(ours - absmax).max() <= np.abs(theirs - absmax).max()


@pytest.mark.parametrize("shape", [(48, 64), (3, 65), (65,), (2, 3, 64), (0, 64), (1,), (5, 1)])
def test_shapes_and_sizes(shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, dtype=torch.bfloat16)
    w4 = qlora_ext.quantize_nf4(w)
    even = shape[-1] % 2 == 0
    assert w4.packed.shape == ((*shape[:-1], shape[-1] // 2) if even else ((w.numel() + 1) // 2,))
    assert (w4.shape, w4.dtype, w4.block_size, w4.double_quant) == (w.shape, torch.bfloat16, 64, True)
    assert w4.dequantize().shape == w.shape
    assert w4.dequantize().dtype == torch.bfloat16
    assert qlora_ext.dequantize_nf4(w4, torch.float32).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_default_dtype_is_that_of_the_original(dtype: torch.dtype) -> None:
    w4 = qlora_ext.quantize_nf4(torch.randn(8, 64, dtype=dtype))
    assert w4.dequantize().dtype == qlora_ext.dequantize_nf4(w4).dtype == dtype
    assert torch.equal(w4.dequantize(), qlora_ext.dequantize_nf4(w4))


def test_memory_is_that_of_the_paper() -> None:
    w = torch.randn(1024, 4096)
    w4 = qlora_ext.quantize_nf4(w)
    assert w4.nbytes == w.numel() // 2 + w.numel() // 64 + 4 * (w.numel() // (64 * 256)) + 4
    assert abs(w4.bits_per_param - 4.127) < 0.001
    assert qlora_ext.quantize_nf4(w, double_quant=False).bits_per_param == 4.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_non_finite_input(bad: float, dtype: torch.dtype, device: str) -> None:
    w = torch.randn(4, 128, dtype=dtype)
    w[2, 70] = bad
    w = w.to(device)
    with pytest.raises(ValueError, match=r"w: expected finite values, got .* at index \[2, 70\] \(1 of 8 blocks"):
        qlora_ext.quantize_nf4(w)
    packed, absmax = torch.ops.qlora.quantize_nf4(w, 64)
    decoded = torch.ops.qlora.dequantize_nf4(packed, absmax, None, None, 64, 256, [4, 128], torch.float32)
    assert decoded[2, 64:].isnan().all()
    assert decoded[2, :64].isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"w": [1.0]}, TypeError, "w: expected a torch.Tensor, got list"),
        (
            {"w": torch.zeros(4, dtype=torch.int8)},
            TypeError,
            "w: expected float32, bfloat16 or float16, got torch.int8",
        ),
        ({"w": torch.zeros(4, dtype=torch.float64)}, TypeError, "got torch.float64"),
        ({"w": torch.zeros(4), "block_size": 100}, ValueError, "block_size: .* got 100"),
        ({"w": torch.zeros(4), "block_size": "64"}, ValueError, "block_size: .* got '64'"),
        ({"w": torch.zeros(4), "nested_block_size": 0}, ValueError, "nested_block_size: .* got 0"),
    ],
)
def test_wrong_arguments(arguments: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        qlora_ext.quantize_nf4(**arguments)


def test_wrong_arguments_of_the_function() -> None:
    w4 = qlora_ext.quantize_nf4(torch.randn(8, 64))
    with pytest.raises(TypeError, match="w4: expected an NF4Weight.*got Tensor"):
        qlora_ext.linear_nf4(torch.zeros(2, 64), torch.zeros(8, 64))
    with pytest.raises(ValueError, match=r"x: expected shape \[..., 64\].*got \[2, 63\]"):
        qlora_ext.linear_nf4(torch.zeros(2, 63), w4)
    with pytest.raises(ValueError, match="w4: expected a weight of shape"):
        qlora_ext.linear_nf4(torch.zeros(2, 64), qlora_ext.quantize_nf4(torch.zeros(64)))


@pytest.mark.parametrize(("attribute", "value"), [("requires_grad", False), ("grad", None), ("data", zeros())])
def test_setting_an_attribute_holds_no_reference(attribute: str, value: Any) -> None:
    """torch never releases what ``__torch_function__`` returns for a setter, so that must not be the weight."""
    parameter = torch.nn.Parameter(zeros())
    setattr(parameter, attribute, value)
    alive = weakref.ref(parameter)
    del parameter
    gc.collect()
    assert alive() is None


@pytest.mark.cuda
def test_moved_to_the_device_and_back() -> None:
    w4 = qlora_ext.quantize_nf4(torch.randn(8, 128))
    there = w4.to("cuda")
    assert there.device.type == "cuda"
    assert torch.equal(there.dequantize().cpu(), w4.dequantize())
