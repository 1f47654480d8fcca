"""bitsandbytes' 4-bit state, both ways, against the installed bitsandbytes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import qlora_ext
from qlora_ext import NF4Weight

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

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
    # Its generic decoder: its CPU kernel misplaces the scales of rows that are not a multiple of the block.
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


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [32, 64, 256, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reads_and_writes_its_bytes(dtype: torch.dtype, block_size: int, double_quant: bool) -> None:
    theirs = saved_by_bitsandbytes(torch.randn(48, 160).to(dtype), block_size, double_quant)
    w4 = NF4Weight.from_bitsandbytes(theirs, PREFIX)
    assert (w4.dtype, w4.block_size, w4.double_quant) == (dtype, block_size, double_quant)
    assert torch.equal(w4.dequantize(), decoded_by_bitsandbytes(theirs))
    ours = w4.to_bitsandbytes(PREFIX)
    assert list(ours) == list(theirs)
    for key, t in theirs.items():
        assert ours[key].dtype == t.dtype
        assert ours[key].shape == t.shape
        assert torch.equal(ours[key], t), key


@pytest.mark.parametrize("double_quant", [True, False])
def test_bitsandbytes_loads_what_we_quantized(double_quant: bool) -> None:
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


def test_refuses_fp4_and_int8_by_name() -> None:
    with pytest.raises(ValueError, match=r"expected a bitsandbytes NF4 weight, got FP4"):
        NF4Weight.from_bitsandbytes(saved_by_bitsandbytes(torch.randn(4, 64), quant_type="fp4"), PREFIX)
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
