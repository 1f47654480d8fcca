"""Tensors that do not fit are rejected in one sentence, which names the weight and the tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoint_samples import (
    SAMPLES,
    Sample,
    awq,
    compressed_mxfp4,
    compressed_nvfp4,
    float_quantized,
    fp8,
    gptq,
    int8,
    kind_of,
    mlx,
    modelopt,
    modelopt_fp8,
    mxfp4,
    mxfp8,
    packed,
)
from qlora_ext.weight import Weight4bit

WHERE = "model.layers.0.mlp.up_proj"


def read(sample: Sample, shape: tuple[int, ...] | None = None, **changes: Tensor | None) -> Weight4bit:
    """Reads a sample with some tensors replaced, or removed if they are None."""
    kind, settings = kind_of(sample)
    tensors = {name: t for name, t in {**sample.tensors, **changes}.items() if t is not None}
    return kind.read(tensors, shape or sample.shape, torch.bfloat16, settings, WHERE)


def rejected(name: str, sample: Sample, shape: tuple[int, ...] | None = None, **changes: Tensor | None) -> str:
    """The message of the error, which names the weight and the tensor ``name`` and is one line."""
    with pytest.raises(ValueError, match="expected") as error:
        read(sample, shape, **changes)
    message = str(error.value)
    assert name in message, message
    assert WHERE in message, message
    assert "\n" not in message
    assert len(message) < 500
    return message


def with_value(t: Tensor, value: Any) -> Tensor:
    """``t`` with another last element; of 8-bit floating-point numbers, with other bits."""
    changed = t.clone()
    bits = changed.view(torch.uint8) if t.is_floating_point() and t.itemsize == 1 else changed
    bits.view(-1)[-1] = value
    return changed


@pytest.mark.parametrize("name", SAMPLES)
def test_a_missing_tensor_is_named(name: str) -> None:
    sample = SAMPLES[name]()
    kind, settings = kind_of(sample)
    for tensor, required in kind.tensors(settings).items():
        if required:
            assert f"expected the tensor {tensor}" in rejected(tensor, sample, **{tensor: None})


@pytest.mark.parametrize("name", SAMPLES)
def test_an_unexpected_tensor_is_named(name: str) -> None:
    sample = SAMPLES[name]()
    for extra in ("pre_quant_scale", "weight_zero_points", "\x1b[2J"):
        assert "\x1b" not in rejected("", sample, **{extra: torch.zeros(3)})
    rejected("pre_quant_scale", sample, pre_quant_scale=torch.zeros(3))


@pytest.mark.parametrize("name", SAMPLES)
def test_tensors_of_another_dtype_or_shape_are_named(name: str) -> None:
    sample = SAMPLES[name]()
    kind, settings = kind_of(sample)
    for tensor, t in sample.tensors.items():
        if not kind.tensors(settings)[tensor] and tensor not in ("g_idx", "weight_g_idx"):
            continue  # kept as it is
        for other in (t.double(), t.flatten()[1:], t[..., None, None], torch.cat((t[None], t[None]))):
            rejected(tensor, sample, **{tensor: other})
        rejected(tensor, sample, **{tensor: t.to("meta")})
        rejected(tensor, sample, **{tensor: t.float().to_sparse() if t.ndim else torch.zeros(1).to_sparse()})


@pytest.mark.parametrize("name", SAMPLES)
def test_a_weight_of_another_shape_is_rejected(name: str) -> None:
    sample = SAMPLES[name]()
    *stack, rows, columns = sample.shape
    for shape in ((rows + 8, columns), (rows, columns + 128), (rows, 2 * columns), (2 * rows, columns // 2)):
        with pytest.raises(ValueError, match="expected"):
            read(sample, (*stack, *shape))


SHAPES: tuple[Any, ...] = ((), (64,), (0, 64), (64, 0), (-1, 64), (4.0, 64), (2**62, 2**62), "ab", None, (1, 2, 3, 64))


@pytest.mark.parametrize("name", SAMPLES)
def test_impossible_shapes_are_rejected(name: str) -> None:
    kind, settings = kind_of(SAMPLES[name]())
    for shape in SHAPES:
        with pytest.raises(ValueError, match="expected"):
            kind.form(settings, shape)


@pytest.mark.parametrize(
    ("make", "shape", "reason"),
    [
        (mxfp4, (3, 6, 48), "a multiple of 32 elements"),
        (compressed_mxfp4, (6, 80), "a multiple of 32 elements"),
        (compressed_nvfp4, (6, 24), "a multiple of 16 elements"),
        (modelopt, (6, 24), "a multiple of 16 elements"),
        (packed, (6, 33), "got groups of 32 in rows of 33"),
        (lambda: packed(group=None), (6, 1000), "got groups of 1000 in rows of 1000"),
        (awq, (12, 256), "a multiple of 8 rows"),
        (gptq, (12, 256), "a multiple of 8 rows"),
        (lambda: gptq(group=-1), (16, 24), "got groups of 24 in rows of 24"),
        (mlx, (16, 96), "got groups of 64 in rows of 96"),
        (fp8, (16, 72), "got groups of 128 in rows of 72"),
        (int8, (16, 72), "got groups of 72 in rows of 72"),
    ],
)
def test_rows_without_whole_groups_are_rejected(
    make: Callable[[], Sample], shape: tuple[int, ...], reason: str
) -> None:
    kind, settings = kind_of(make())
    with pytest.raises(ValueError, match=reason):
        kind.form(settings, shape)


def test_scales_that_are_no_numbers_are_rejected() -> None:
    for make, name in ((mxfp4, "scales"), (compressed_mxfp4, "weight_scale")):
        sample = make()
        assert "0xFF, which is NaN" in rejected(name, sample, **{name: with_value(sample.tensors[name], 255)})
    for make in (compressed_nvfp4, modelopt):
        for code in (0x7F, 0xFF):
            sample = make()
            scale = with_value(sample.tensors["weight_scale"], code)
            assert "got NaN" in rejected("weight_scale", sample, weight_scale=scale)
    for make, name in ((lambda: fp8(dtype=torch.float8_e8m0fnu), "weight_scale_inv"), (mxfp8, "weight_scale")):
        sample = make()
        assert "0xFF, which is NaN" in rejected(name, sample, **{name: with_value(sample.tensors[name], 255)})
        assert "larger values" in rejected(name, sample, **{name: with_value(sample.tensors[name], 254)})
    for make, name in ((fp8, "weight_scale_inv"), (float_quantized, "weight_scale"), (modelopt_fp8, "weight_scale")):
        for value in (float("nan"), float("inf"), 1e37):
            sample = make()
            message = rejected(name, sample, **{name: with_value(sample.tensors[name], value)})
            assert "all values are finite in float32, got NaN, infinite or larger values" in message
    for make, name in ((packed, "weight_scale"), (awq, "scales"), (gptq, "scales"), (int8, "weight_scale")):
        for value in (float("nan"), float("inf"), float("-inf")):
            sample = make()
            assert "NaN or infinite" in rejected(name, sample, **{name: with_value(sample.tensors[name], value)})


def test_codes_that_are_no_numbers_are_rejected() -> None:
    for make, codes in (
        (fp8, (0x7F, 0xFF)),
        (mxfp8, (0x7F,)),
        (lambda: fp8(codes=torch.float8_e5m2), (0x7C, 0x7F, 0xFD)),
    ):
        for code in codes:
            sample = make()
            message = rejected("weight", sample, weight=with_value(sample.tensors["weight"], code))
            assert "codes of numbers, got NaN or infinity" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0, 1e-38])
def test_factors_that_make_no_scales_are_rejected(value: float) -> None:
    rejected("weight_global_scale", compressed_nvfp4(), weight_global_scale=torch.tensor([value]))
    if value != 1e-38:
        rejected("weight_scale_2", modelopt(), weight_scale_2=torch.tensor(value))
    rejected("weight_scale_2", modelopt(), weight_scale_2=torch.tensor(1e37))


def test_an_activation_order_that_the_configuration_does_not_mention_is_rejected() -> None:
    order = torch.arange(256, dtype=torch.int32) // 128
    order[[3, 200]] = order[[200, 3]]
    assert "an activation order, which the configuration does not mention" in rejected("g_idx", gptq(), g_idx=order)
    rejected("weight_g_idx", packed((12, 256), 128), weight_g_idx=order)


@pytest.mark.parametrize("desc_act", [False, True])
def test_groups_of_another_size_are_rejected(desc_act: bool) -> None:
    columns = torch.arange(256, dtype=torch.int32)
    for other in (columns // 64, columns // 200, columns // 128 + 1, columns // 128 - 2, columns.flip(0) // 64):
        message = rejected("g_idx", gptq(desc_act=desc_act), g_idx=other)
        assert "expected g_idx to be groups of 128 columns" in message


def test_zero_points_out_of_range_are_rejected() -> None:
    sample = SAMPLES["packed-zero-points-unpacked"]()
    for value in (8, -9, 127, -128):
        zero_points = with_value(sample.tensors["weight_zero_point"], value)
        assert "from -8 to 7" in rejected("weight_zero_point", sample, weight_zero_point=zero_points)
    sample = gptq()
    message = rejected("qzeros", sample, qzeros=with_value(sample.tensors["qzeros"], 0x77777776))
    assert "7 throughout, because sym is true" in message


def test_padding_that_would_be_lost_is_rejected() -> None:
    sample = packed((13, 192), symmetric=False)
    words = with_value(sample.tensors["weight_zero_point"], -1)
    rejected("weight_zero_point", sample, weight_zero_point=words)


def test_scales_too_large_for_zero_points_are_rejected() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        sample = packed(symmetric=False, dtype=dtype)
        rejected("weight_scale", sample, weight_scale=with_value(sample.tensors["weight_scale"], 2.0**125))
        sample = packed(dtype=dtype)
        read(sample, weight_scale=with_value(sample.tensors["weight_scale"], 2.0**125))


def test_scales_of_mlx_that_make_infinite_values_are_rejected() -> None:
    sample = mlx()
    for value in (3e37, -3e37):
        rejected("scales", sample, scales=with_value(sample.tensors["scales"], value))
    rejected("biases", sample, biases=with_value(sample.tensors["biases"], float("inf")))


def test_another_weight_shape_is_named() -> None:
    rejected("weight_shape", packed(), weight_shape=torch.tensor([12, 193]))
    rejected("weight_shape", packed(), weight_shape=torch.tensor([12, 192, 1]))
    assert read(packed(), weight_shape=torch.tensor([12, 192], dtype=torch.int32)).shape == (12, 192)


def test_long_and_hostile_names_are_shortened() -> None:
    sample = mxfp4()
    kind, settings = kind_of(sample)
    with pytest.raises(ValueError, match="expected the tensor blocks") as error:
        kind.read({}, sample.shape, torch.bfloat16, settings, "\x1b" + "x" * 5000)
    assert len(str(error.value)) < 400
    assert "\x1b" not in str(error.value)
