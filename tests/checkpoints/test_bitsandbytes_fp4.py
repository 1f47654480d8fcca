"""bitsandbytes' FP4: decoded to its bits, and written to its bytes."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor

from qlora_ext.weight import NF4Weight, Weight4bit

PREFIX = "model.layers.0.mlp.up_proj.weight"


def saved(w: Tensor, block_size: int = 64, double_quant: bool = True, kind: str = "fp4") -> dict[str, Tensor]:
    """What bitsandbytes saves for ``w``."""
    packed, state = bnb.functional.quantize_4bit(
        w, blocksize=block_size, compress_statistics=double_quant, quant_type=kind
    )
    return {PREFIX: packed, **{f"{PREFIX}.{key}": t for key, t in state.as_dict(packed=True).items()}}


def decoded_by_bitsandbytes(tensors: dict[str, Tensor]) -> Tensor:
    state = {key.removeprefix(f"{PREFIX}."): t.clone() for key, t in tensors.items() if key != PREFIX}
    weight = bnb.nn.Params4bit.from_prequantized(tensors[PREFIX], state, device="cpu")
    decoded: Tensor = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    return decoded + 0.0  # on processors without AVX-512, its decoder gives -0.0 for code 8


def read(tensors: dict[str, Tensor]) -> Weight4bit:
    return Weight4bit.from_bitsandbytes(tensors, PREFIX)


def bits(t: Tensor) -> Tensor:
    return t.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reads_and_writes_its_bytes(dtype: torch.dtype, block_size: int, double_quant: bool) -> None:
    theirs = saved(torch.randn(48, 128).to(dtype), block_size, double_quant)
    w4 = read(theirs)
    assert (w4.code, w4.dtype, w4.block_size, w4.double_quant) == ("fp4", dtype, block_size, double_quant)
    assert torch.equal(bits(w4.dequantize()), bits(decoded_by_bitsandbytes(theirs)))
    ours = w4.to_bitsandbytes(PREFIX)
    assert list(ours) == list(theirs)
    for key, t in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (t.dtype, t.shape)
        assert torch.equal(bits(ours[key]), bits(t)), key


def test_every_code_has_their_value() -> None:
    tensors = saved(torch.ones(4, 64), double_quant=False)
    codes = torch.arange(256, dtype=torch.uint8)[:128]
    tensors[PREFIX] = codes.reshape(-1, 1)
    assert torch.equal(bits(read(tensors).dequantize()), bits(decoded_by_bitsandbytes(tensors)))
    tensors[PREFIX] = (codes + 128).reshape(-1, 1)
    assert torch.equal(bits(read(tensors).dequantize()), bits(decoded_by_bitsandbytes(tensors)))


def test_nf4_is_read_alike() -> None:
    tensors = saved(torch.randn(4, 64), kind="nf4")
    w4 = read(tensors)
    assert isinstance(w4, NF4Weight)
    assert torch.equal(w4.dequantize(), NF4Weight.from_bitsandbytes(tensors, PREFIX).dequantize())
    with pytest.raises(ValueError, match="expected a bitsandbytes NF4 weight, got FP4"):
        NF4Weight.from_bitsandbytes(saved(torch.randn(4, 64)), PREFIX)


def test_forms_that_bitsandbytes_lacks_are_rejected() -> None:
    w4 = read(saved(torch.randn(4, 64), double_quant=False))
    with pytest.raises(ValueError, match="code: expected nf4 or fp4, got e2m1, which bitsandbytes lacks"):
        w4.replace(code="e2m1").to_bitsandbytes(PREFIX)
    with pytest.raises(ValueError, match="which bitsandbytes lacks"):
        w4.replace(absmax=w4.absmax.half()).to_bitsandbytes(PREFIX)


def test_states_of_two_codes_are_rejected() -> None:
    both = {**saved(torch.randn(4, 64), kind="nf4"), **saved(torch.randn(4, 64))}
    with pytest.raises(ValueError, match="expected a bitsandbytes NF4 or FP4 weight, got both FP4 and NF4"):
        read(both)


def test_a_state_under_another_name_is_rejected() -> None:
    tensors = saved(torch.randn(4, 64))
    renamed = {key.replace("bitsandbytes__fp4", "bitsandbytes__nf4"): t for key, t in tensors.items()}
    with pytest.raises(ValueError, match="expected quant_type 'nf4', got 'fp4'"):
        read(renamed)
    nf4 = saved(torch.randn(4, 64), kind="nf4")
    with pytest.raises(ValueError, match="expected bitsandbytes' own code values"):
        read({**tensors, f"{PREFIX}.quant_map": nf4[f"{PREFIX}.quant_map"]})
    with pytest.raises(ValueError, match="expected a bitsandbytes NF4 or FP4 weight, got AF4"):
        read({key.replace("__fp4", "__af4"): t for key, t in tensors.items()})
