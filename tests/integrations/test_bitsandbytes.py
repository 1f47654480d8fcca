"""Conversion to and from bitsandbytes' NF4 and FP4 states, compared with the installed bitsandbytes."""

from __future__ import annotations

import json
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor

import qlora_ext
from qlora_ext import NF4Weight, Weight4bit
from tensors import same_bits

PREFIX = "model.layers.0.mlp.up_proj.weight"
STATE = f"{PREFIX}.quant_state.bitsandbytes__nf4"


def saved_by_bitsandbytes(
    w: Tensor, block_size: int = 64, double_quant: bool = True, **options: Any
) -> dict[str, Tensor]:
    packed, state = bnb.functional.quantize_4bit(
        w, blocksize=block_size, compress_statistics=double_quant, **{"quant_type": "nf4", **options}
    )
    return {PREFIX: packed, **{f"{PREFIX}.{key}": t for key, t in state.as_dict(packed=True).items()}}


def decoded_by_bitsandbytes(state_dict: dict[str, Tensor]) -> Tensor:
    # Its generic decoder, because its CPU kernel uses wrong scales if rows are not a multiple of the block.
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    companions = {key.removeprefix(f"{PREFIX}."): t.clone() for key, t in state_dict.items() if key != PREFIX}
    state = bnb.functional.QuantState.from_dict(companions, torch.device("cpu"))
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    packed = state_dict[PREFIX].view(torch.uint8).reshape(-1)
    decoded: Tensor = _dequantize_4bit_compute(packed, absmax, state.code, state.blocksize, state.shape, state.dtype)
    return decoded


def rewrite(state_dict: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    state = json.loads(bytes(state_dict[STATE].tolist())) | changes
    return {**state_dict, STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [32, 64, 256, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reads_and_writes_its_bytes(dtype: torch.dtype, block_size: int, double_quant: bool, kind: str) -> None:
    theirs = saved_by_bitsandbytes(torch.randn(48, 160).to(dtype), block_size, double_quant, quant_type=kind)
    w4 = Weight4bit.from_bitsandbytes(theirs, PREFIX)
    assert (w4.code, w4.dtype, w4.block_size, w4.double_quant) == (kind, dtype, block_size, double_quant)
    assert torch.equal(w4.dequantize(), decoded_by_bitsandbytes(theirs))
    ours = w4.to_bitsandbytes(PREFIX)
    assert list(ours) == list(theirs)
    assert same_bits(ours, theirs)


@pytest.mark.parametrize("double_quant", [True, False])
def test_bitsandbytes_loads_our_weights(double_quant: bool) -> None:
    w4 = qlora_ext.quantize_nf4(torch.randn(64, 128, dtype=torch.bfloat16), double_quant=double_quant)
    exported = w4.to_bitsandbytes(PREFIX)
    stats = {key.removeprefix(f"{PREFIX}."): t for key, t in exported.items() if key != PREFIX}
    weight = bnb.nn.Params4bit.from_prequantized(exported[PREFIX], stats, device="cpu")
    assert torch.equal(bnb.functional.dequantize_4bit(weight.data, weight.quant_state), w4.dequantize())


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_storage_dtype_is_only_bytes(storage: torch.dtype) -> None:
    w = torch.randn(64, 128)
    theirs = saved_by_bitsandbytes(w, quant_storage=storage)
    assert theirs[PREFIX].dtype == storage
    assert torch.equal(NF4Weight.from_bitsandbytes(theirs, PREFIX).packed, qlora_ext.quantize_nf4(w).packed)


def test_odd_counts_keep_their_last_half_byte() -> None:
    theirs = saved_by_bitsandbytes(torch.randn(5, 13))
    w4 = NF4Weight.from_bitsandbytes(theirs, PREFIX)
    assert torch.equal(w4.dequantize(), decoded_by_bitsandbytes(theirs))
    assert torch.equal(w4.to_bitsandbytes(PREFIX)[PREFIX], theirs[PREFIX])


def fp4(**options: Any) -> dict[str, Tensor]:
    return saved_by_bitsandbytes(torch.randn(4, 64), quant_type="fp4", **options)


def test_every_code_has_their_value() -> None:
    tensors = fp4(double_quant=False)
    for first in (0, 128):
        tensors[PREFIX] = torch.arange(first, first + 128).to(torch.uint8).reshape(-1, 1)
        found, expected = Weight4bit.from_bitsandbytes(tensors, PREFIX).dequantize(), decoded_by_bitsandbytes(tensors)
        assert same_bits({"w": found}, {"w": expected + 0.0})  # some decoders give -0.0 for code 8


def test_forms_that_bitsandbytes_lacks_are_rejected() -> None:
    w4 = Weight4bit.from_bitsandbytes(fp4(double_quant=False), PREFIX)
    with pytest.raises(ValueError, match="code: expected nf4 or fp4, got e2m1, which bitsandbytes lacks"):
        w4.replace(code="e2m1").to_bitsandbytes(PREFIX)
    with pytest.raises(ValueError, match="which bitsandbytes lacks"):
        w4.replace(absmax=w4.absmax.half()).to_bitsandbytes(PREFIX)


def test_states_of_two_codes_and_under_another_name_are_rejected() -> None:
    nf4, tensors = saved_by_bitsandbytes(torch.randn(4, 64)), fp4()
    renamed = {key.replace("bitsandbytes__fp4", "bitsandbytes__nf4"): t for key, t in tensors.items()}
    for state, message in (
        ({**nf4, **tensors}, "expected a bitsandbytes NF4 or FP4 weight, got both FP4 and NF4"),
        (renamed, "expected quant_type 'nf4', got 'fp4'"),
        ({**tensors, f"{PREFIX}.quant_map": nf4[f"{PREFIX}.quant_map"]}, "expected bitsandbytes' own code values"),
        ({key.replace("__fp4", "__af4"): t for key, t in tensors.items()}, "NF4 or FP4 weight, got AF4"),
    ):
        with pytest.raises(ValueError, match=message):
            Weight4bit.from_bitsandbytes(state, PREFIX)


def test_refuses_fp4_and_int8_by_name() -> None:
    with pytest.raises(ValueError, match=r"expected a bitsandbytes NF4 weight, got FP4"):
        NF4Weight.from_bitsandbytes(fp4(), PREFIX)
    int8 = {PREFIX: torch.zeros(4, 64, dtype=torch.int8), PREFIX.replace("weight", "SCB"): torch.ones(4)}
    with pytest.raises(ValueError, match=r"got int8"):
        NF4Weight.from_bitsandbytes(int8, PREFIX)


@pytest.mark.parametrize("key", [PREFIX, f"{PREFIX}.absmax", f"{PREFIX}.quant_map", f"{PREFIX}.nested_absmax", STATE])
def test_names_a_missing_key(key: str) -> None:
    state = saved_by_bitsandbytes(torch.randn(4, 64))
    del state[key]
    with pytest.raises(KeyError, match=key.rpartition(".")[2]):
        NF4Weight.from_bitsandbytes(state, PREFIX)


def test_refuses_parts_that_do_not_fit() -> None:
    state = saved_by_bitsandbytes(torch.randn(4, 64))
    with pytest.raises(ValueError, match=r"expected 160 packed bytes for shape \[5, 64\], got 128"):
        NF4Weight.from_bitsandbytes(rewrite(state, shape=[5, 64]), PREFIX)
    with pytest.raises(ValueError, match=r"block_size: expected a power of two"):
        NF4Weight.from_bitsandbytes(rewrite(state, blocksize=48), PREFIX)
    with pytest.raises(ValueError, match=r"quant_type 'nf4', got 'af4'"):
        NF4Weight.from_bitsandbytes(rewrite(state, quant_type="af4"), PREFIX)
    with pytest.raises(ValueError, match=r"expected bitsandbytes' own code values"):
        NF4Weight.from_bitsandbytes({**state, f"{PREFIX}.quant_map": torch.linspace(-1, 1, 16)}, PREFIX)
    with pytest.raises(ValueError, match=r"expected JSON in a uint8 tensor"):
        NF4Weight.from_bitsandbytes({**state, STATE: torch.tensor([123], dtype=torch.uint8)}, PREFIX)


def encoded(text: str | bytes) -> Tensor:
    return torch.tensor(list(text.encode() if isinstance(text, str) else text), dtype=torch.uint8)


MALFORMED: dict[str, dict[str, Any]] = {
    # the JSON
    "empty": {STATE: encoded("")},
    "no object": {STATE: encoded("[1, 2]")},
    "a number": {STATE: encoded("5")},
    "null": {STATE: encoded("null")},
    "deeply nested": {STATE: encoded("[" * 30000 + "]" * 30000)},
    "deeply nested objects": {STATE: encoded('{"a":' * 10000 + "1" + "}" * 10000)},
    "endless digits": {STATE: encoded('{"shape": [' + "9" * 50000 + "]}")},
    "too long": {STATE: encoded(" " * 70000)},
    "no UTF-8": {STATE: encoded(bytes([0xFF, 0xFE, 0x80]))},
    "floats": {STATE: torch.rand(50)},
    "wide bytes": {STATE: torch.full((50,), 123, dtype=torch.int64)},
    "two dimensions": {STATE: encoded("{}").reshape(1, 2)},
    "meta": {STATE: torch.empty(50, dtype=torch.uint8, device="meta")},
    "no tensor": {STATE: b"{}"},
    # what is in it
    **{
        f"shape {str(shape)[:30]}": {"shape": shape}
        for shape in (
            5,
            "4x64",
            {"0": 4},
            [4.0, 64],
            [True, 256],
            [-4, -64],
            [-1, 64],
            [2**63, 64],
            [2**62, 4],
            [2**31] * 3,
            [10**400],
            [0, 2**62, 2**62],
            [4, [64]],
            [4, None],
            [2**63 - 1, 0],
        )
    },
    **{
        f"blocksize {str(size)[:30]}": {"blocksize": size}
        for size in (0, -64, 63, 64.0, "64", [64], {}, True, 2**63, 10**400)
    },
    **{
        f"nested_blocksize {str(size)[:30]}": {"nested_blocksize": size}
        for size in (0, -256, 256.0, "256", None, [], True, 2**20 + 1, 2**63 - 1, 2**63, 10**400, 1)
    },
    **{
        f"nested_offset {str(offset)[:30]}": {"nested_offset": offset}
        for offset in (float("nan"), float("inf"), -float("inf"), 1e300, 10**400, "0.1", None, [0.1], True, {})
    },
    **{
        f"dtype {str(dtype)[:30]}": {"dtype": dtype}
        for dtype in ("int8", "uint8", "float64", "complex64", "bits8", "nn", "__class__", "", 5, ["float32"], {})
    },
    **{f"quant_type {kind}": {"quant_type": kind} for kind in ("fp4", "", 4, ["nf4"], True)},
    # the tensors
    "packed of another size": {PREFIX: torch.zeros(127, 1, dtype=torch.uint8)},
    "packed sparse": {PREFIX: torch.zeros(128, 1, dtype=torch.uint8).to_sparse()},
    "packed None": {PREFIX: None},
    "packed meta": {PREFIX: torch.empty(128, 1, dtype=torch.uint8, device="meta")},
    "absmax float": {f"{PREFIX}.absmax": torch.rand(4)},
    "absmax int64": {f"{PREFIX}.absmax": torch.ones(4, dtype=torch.int64)},
    "absmax of another size": {f"{PREFIX}.absmax": torch.zeros(5, dtype=torch.uint8)},
    "absmax list": {f"{PREFIX}.absmax": [1, 2, 3, 4]},
    "quant_map int": {f"{PREFIX}.quant_map": torch.arange(16)},
    "quant_map complex": {f"{PREFIX}.quant_map": torch.zeros(16, dtype=torch.complex64)},
    "quant_map NaN": {f"{PREFIX}.quant_map": torch.full((16,), float("nan"))},
    "quant_map short": {f"{PREFIX}.quant_map": torch.zeros(15)},
    "quant_map backwards": {f"{PREFIX}.quant_map": torch.linspace(1, -1, 16)},
    "nested_quant_map ramp": {f"{PREFIX}.nested_quant_map": torch.linspace(-1, 1, 256)},
    "nested_quant_map bytes": {f"{PREFIX}.nested_quant_map": torch.arange(256).byte()},
    "nested_absmax NaN": {f"{PREFIX}.nested_absmax": torch.tensor([float("nan")])},
    "nested_absmax infinite": {f"{PREFIX}.nested_absmax": torch.tensor([float("inf")])},
    "nested_absmax negative": {f"{PREFIX}.nested_absmax": torch.tensor([-1.0])},
    "nested_absmax bytes": {f"{PREFIX}.nested_absmax": torch.ones(1, dtype=torch.uint8)},
    "nested_absmax of another size": {f"{PREFIX}.nested_absmax": torch.ones(2)},
    "nested_absmax empty": {f"{PREFIX}.nested_absmax": torch.ones(0)},
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_state_is_refused_in_a_sentence(what: str) -> None:
    state = saved_by_bitsandbytes(torch.randn(4, 64))
    changes = MALFORMED[what]
    inside = {key: value for key, value in changes.items() if not key.startswith(PREFIX)}
    if inside:
        changes = {STATE: rewrite(state, **inside)[STATE]}
    with pytest.raises(ValueError, match=r"expected") as error:
        NF4Weight.from_bitsandbytes({**state, **changes}, PREFIX)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("absent", ["quant_type", "blocksize", "dtype", "shape", "nested_offset"])
def test_a_state_without_one_of_its_fields_is_refused(absent: str) -> None:
    state = saved_by_bitsandbytes(torch.randn(4, 64))
    fields = json.loads(bytes(state[STATE].tolist()))
    del fields[absent]
    with pytest.raises(ValueError, match=f"expected the fields? {absent} too"):
        NF4Weight.from_bitsandbytes({**state, STATE: encoded(json.dumps(fields))}, PREFIX)


@pytest.mark.parametrize(
    "absmax", [torch.full((4,), float("nan")), -torch.ones(4), torch.ones(4).byte(), torch.ones(3)]
)
def test_malformed_scales_without_double_quantization(absmax: Tensor) -> None:
    state = saved_by_bitsandbytes(torch.randn(4, 64), double_quant=False)
    with pytest.raises(ValueError, match=r"absmax"):
        NF4Weight.from_bitsandbytes({**state, f"{PREFIX}.absmax": absmax}, PREFIX)


def test_a_shape_of_more_than_64_dimensions_is_no_trouble() -> None:
    w = torch.randn(4, 64)
    state = saved_by_bitsandbytes(w)
    w4 = NF4Weight.from_bitsandbytes(rewrite(state, shape=[1] * 80 + [4, 64]), PREFIX)
    assert torch.equal(w4.dequantize().reshape(4, 64), NF4Weight.from_bitsandbytes(state, PREFIX).dequantize())
