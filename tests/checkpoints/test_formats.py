"""Every checkpoint format decodes to its reference's bits, and writes the bytes that it read."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest
import torch

from checkpoint_samples import SAMPLES, Sample, deepseek_fp4, fp8, kind_of, mxfp4, packed
from qlora_ext.checkpoints import alternating_rows, format_of, grouped_rows, retained_of, select_rows
from qlora_ext.checkpoints.mxfp4 import MXFP4
from qlora_ext.weight import Weight4bit
from tensors import same_bits


def read(sample: Sample, dtype: torch.dtype = torch.bfloat16) -> Weight4bit:
    kind, settings = kind_of(sample)
    return kind.read(sample.tensors, sample.shape, dtype, settings, "layers.0.up_proj")


def decoded(w4: Weight4bit, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The values of a matrix, or of a stack of matrices, which are decoded one by one."""
    matrices = [w4.matrix(e) for e in range(len(w4.packed))] if len(w4.shape) == 3 else [w4]
    return torch.stack([matrix.dequantize(dtype) for matrix in matrices]).view(w4.shape)


def same_bytes(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Also that no tensor is a strided view, which files cannot store."""
    return same_bits(found, expected) and all(t.is_contiguous() for t in found.values())


@pytest.mark.parametrize("name", SAMPLES)
def test_a_weight_decodes_to_the_bits_of_its_reference(name: str) -> None:
    sample = SAMPLES[name]()
    w4 = read(sample)
    values = decoded(w4, torch.float32).numpy()
    assert w4.shape == torch.Size(sample.shape)
    np.testing.assert_array_equal(values.view(np.uint32), sample.values.astype(np.float32).view(np.uint32))
    rounded = torch.from_numpy(sample.values).to(torch.bfloat16)
    assert same_bits({"w": decoded(w4)}, {"w": rounded})


def test_zero_points_with_scales_of_any_sign() -> None:
    """Only the sign of a zero differs from the formula: for a negative scale, and for a scale of 0."""
    sample = packed(symmetric=False)
    sample.tensors["weight_scale"][0], sample.tensors["weight_scale"][1] = 0.0, -sample.tensors["weight_scale"][1]
    np.testing.assert_array_equal(read(sample).dequantize(torch.float32).numpy(), sample.values)


def test_a_zero_point_of_gptq_below_its_smallest() -> None:
    """Version 1 stores zero points minus 1, so that 0 wraps around to 15, which AutoGPTQ decodes modulo 16."""
    sample = SAMPLES["gptq-zero-points"]()
    sample.tensors["qzeros"] = torch.full_like(sample.tensors["qzeros"], -1)
    w4 = read(sample)
    assert w4.block_offsets is not None
    assert not w4.block_offsets.any()
    np.testing.assert_array_equal(w4.dequantize(torch.float32).numpy(), sample.values)
    kind, settings = kind_of(sample)
    assert same_bytes(kind.write(w4, settings, retained_of(kind, sample.tensors)), sample.tensors)


def test_zero_points_with_float32_scales() -> None:
    """The only weights that are not decoded bit for bit: the products of 28 bits are rounded to 24."""
    sample = packed(symmetric=False, dtype=torch.float32)
    scale = torch.rand(sample.tensors["weight_scale"].shape, dtype=torch.float32) + 0.5
    sample.tensors["weight_scale"] = scale
    error = np.abs(read(sample).dequantize(torch.float32).numpy() - sample.values)
    assert (error <= 2.0**-18 * np.repeat(scale.numpy(), 32, axis=1)).all()
    kind, settings = kind_of(sample)
    assert same_bytes(kind.write(read(sample), settings, retained_of(kind, sample.tensors)), sample.tensors)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_weight_is_written_as_it_was_read(name: str) -> None:
    sample = SAMPLES[name]()
    kind, settings = kind_of(sample)
    given = {key: t.clone() for key, t in sample.tensors.items()}
    retained = retained_of(kind, sample.tensors)
    kind.check_scales(read(sample), settings, retained)
    written = kind.write(read(sample), settings, retained)
    assert same_bytes(sample.tensors, given)
    assert same_bytes(written, given)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_form_is_known_before_the_tensors(name: str) -> None:
    sample = SAMPLES[name]()
    kind, settings = kind_of(sample)
    form = kind.form(settings, sample.shape)
    assert form == dataclasses.replace(read(sample).form, reordered=False)  # the order of columns is not known
    required = {key for key, needed in kind.tensors(settings).items() if needed}
    assert required <= set(sample.tensors) <= set(kind.tensors(settings))


def test_strided_tensors_are_read_alike() -> None:
    for make in SAMPLES.values():
        sample = make()
        expected = read(sample).tensors
        sample.tensors = {name: t.t().contiguous().t() if t.ndim == 2 else t for name, t in sample.tensors.items()}
        assert same_bytes({name: t.contiguous() for name, t in read(sample).tensors.items()}, expected)


def test_groups_become_the_largest_blocks_that_divide_them() -> None:
    sizes = {name: read(SAMPLES[name]()).block_size for name in SAMPLES}
    assert sizes["packed-channel"] == 16  # rows of 176
    assert sizes["packed-group-48"] == 16
    assert sizes["gptq-short-last-group"] == 64  # groups of 128 in rows of 320
    assert sizes["packed-zero-points-channel"] == 32
    assert sizes["awq"] == 128
    assert sizes["fp8"] == 64  # tiles of 128 in rows of 320
    assert sizes["float-channel"] == sizes["int8-tensor"] == 32  # rows of 96


def test_the_rows_of_gate_and_up_are_put_in_order_and_back() -> None:
    sample = mxfp4((2, 6, 64))
    w4 = read(sample)
    ordered = select_rows(w4, grouped_rows(6))
    expected = np.concatenate([sample.values[:, 0::2], sample.values[:, 1::2]], axis=1)
    np.testing.assert_array_equal(decoded(ordered, torch.float32).numpy(), expected)
    back = select_rows(ordered, alternating_rows(6))
    assert same_bytes(back.tensors, w4.tensors)
    assert same_bytes(select_rows(w4, torch.tensor([4])).tensors, read(row_4_of(sample)).tensors)


def row_4_of(sample: Sample) -> Sample:
    tensors = {name: t[:, 4:5].contiguous() for name, t in sample.tensors.items()}
    return dataclasses.replace(sample, shape=(2, 1, 64), tensors=tensors)


def test_zero_points_follow_their_rows() -> None:
    sample = SAMPLES["packed-zero-points"]()
    rows = torch.tensor([12, 0, 5])
    selected = select_rows(read(sample), rows).dequantize(torch.float32)
    np.testing.assert_array_equal(selected.numpy(), sample.values[rows.numpy()])


def test_rows_that_share_a_scale_are_not_selected() -> None:
    import qlora_ext

    w4 = qlora_ext.quantize_nf4(torch.randn(4, 32), 64, double_quant=False)
    with pytest.raises(ValueError, match="expected rows with scales of their own"):
        select_rows(w4, torch.tensor([1]))


def test_names_of_both_makers_are_known() -> None:
    assert MXFP4().parse("model.layers.3.mlp.experts.gate_up_proj_blocks") == (
        "model.layers.3.mlp.experts.gate_up_proj",
        "blocks",
    )
    assert MXFP4().parse("block.3.mlp.mlp1_weight.scales") == ("block.3.mlp.mlp1_weight", "scales")
    assert MXFP4().parse("block.3.mlp.mlp1_bias") == ("block.3.mlp.mlp1_bias", "")
    assert MXFP4().parse("scales") == ("scales", "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e8m0fnu], ids=str)
def test_transformers_decodes_fp8_alike(dtype: torch.dtype) -> None:
    fp8_of_transformers: Any = pytest.importorskip("transformers.integrations.finegrained_fp8")
    for sample in (fp8((256, 384), dtype=dtype), deepseek_fp4()):
        decode = fp8_of_transformers.Fp8Dequantize(None)._dequantize_one
        expected = decode(*sample.tensors.values(), output_dtype=torch.float32)
        assert torch.equal(decoded(read(sample), torch.float32), expected)


def test_transformers_decodes_gpt_oss_alike() -> None:
    mxfp4_of_transformers: Any = pytest.importorskip("transformers.integrations.mxfp4")
    sample = mxfp4((2, 4, 64))
    sample.tensors["scales"].clamp_(1, 250)
    expected = mxfp4_of_transformers.convert_moe_packed_tensors(**sample.tensors, dtype=torch.float32)
    assert torch.equal(decoded(read(sample), torch.float32), expected.transpose(1, 2))


DATA = pathlib.Path(__file__).parents[1] / "data"
GOLDEN = np.load(DATA / "compressed_tensors.npz")
CASES = json.loads((DATA / "compressed_tensors.json").read_text())["cases"]


def golden(name: str) -> torch.Tensor:
    """The array ``name``, whose dtype may follow its name in the file."""
    key = next(key for key in GOLDEN.files if key.partition("@")[0] == name)
    t = torch.from_numpy(GOLDEN[key])
    dtype = key.partition("@")[2]
    return t.view(getattr(torch, dtype)) if dtype else t


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_a_weight_is_decoded_and_written_as_by_its_library(case: dict[str, Any]) -> None:
    name = case["name"]
    kind, settings = format_of(case["config"])
    tensors = {key: golden(f"{name}.{key}") for key in case["tensors"]}
    expected = golden(f"{name}!decompressed")
    w4 = kind.read(tensors, case["shape"], expected.dtype, settings, name)
    values = {"float32": w4.dequantize(torch.float32), "stored": w4.dequantize()}
    assert same_bits(values, {"float32": golden(f"{name}!float32"), "stored": expected})
    assert same_bytes(kind.write(w4, settings, retained_of(kind, tensors)), tensors)
