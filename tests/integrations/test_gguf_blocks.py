"""Blocks of GGUF files that are used as they are: decoded like the gguf package, and written back byte for byte."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch

from gguf_files import FLOAT16, random_blocks, without_signed_zeros
from qlora_ext.gguf import blocks

SHAPES = [(256,), (1, 256), (3, 512), (5, 1024), (2, 3, 256)]


def expected(kind: str, data: Any, shape: tuple[int, ...]) -> torch.Tensor:
    number = gguf.GGMLQuantizationType[kind]
    values = gguf.dequantize(data.reshape(gguf.quant_shape_to_byte_shape(shape, number)), number)
    return torch.from_numpy(values)


def decoded(w4: Any) -> torch.Tensor:
    if len(w4.shape) < 3:
        return w4.dequantize(torch.float32)
    return torch.stack([w4.matrix(e).dequantize(torch.float32) for e in range(w4.shape[0])])


def assert_same_bits(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == wanted.dtype == torch.float32
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", blocks.KINDS)
def test_random_blocks_have_the_packages_values(kind: str, shape: tuple[int, ...]) -> None:
    data = random_blocks(kind, shape, seed=0)
    w4 = blocks.read(kind, data, shape, "file: tensor")
    assert_same_bits(decoded(w4), expected(kind, data, shape))
    assert blocks.write(kind, w4) == without_signed_zeros(kind, data).tobytes()


@pytest.mark.parametrize("kind", blocks.KINDS)
def test_scales_of_every_size(kind: str) -> None:
    """Every header byte takes each of its values: negative, denormal and zero scales, and each exponent."""
    shape = (256, 256)
    data = random_blocks(kind, shape, seed=1)
    parts = blocks._LAYOUTS[kind].parts
    begin = 0 if next(iter(parts)) == "header" else sum(parts.values()) - parts["header"]
    for at in range(begin, begin + parts["header"]):
        data[:, at] = np.resize(np.arange(256, dtype=np.uint8), len(data))
        if at in FLOAT16[kind]:  # without infinities
            data[:, at] &= 0xBF
    if kind == "MXFP4":
        data[data[:, 0] == 0xFF, 0] = 0xFE
    w4 = blocks.read(kind, data, shape, "file: tensor")
    assert_same_bits(decoded(w4), expected(kind, data, shape))
    assert blocks.write(kind, w4) == without_signed_zeros(kind, data).tobytes()


@pytest.mark.parametrize("kind", [kind for kind in blocks.KINDS if FLOAT16[kind]])
def test_scales_that_are_not_finite(kind: str) -> None:
    for at in FLOAT16[kind]:
        for upper, value in ((0x7C, "inf"), (0xFC, "-inf"), (0x7E, "nan")):
            data = random_blocks(kind, (2, 256), seed=2)
            data[1, at - 1 : at + 1] = (0, upper)
            with pytest.raises(ValueError, match=rf"^a.gguf: t: expected finite scales, got \w+ = {value} in block 1$"):
                blocks.read(kind, data, (2, 256), "a.gguf: t")


def test_an_exponent_that_is_nan() -> None:
    data = random_blocks("MXFP4", (2, 256), seed=2)
    data[9, 0] = 0xFF
    with pytest.raises(ValueError, match=r"^a.gguf: t: expected finite scales, got 0xFF \(NaN\) in block 9$"):
        blocks.read("MXFP4", data, (2, 256), "a.gguf: t")


@pytest.mark.parametrize("kind", blocks.KINDS)
def test_wrong_sizes(kind: str) -> None:
    elements = blocks._LAYOUTS[kind].elements
    data = random_blocks(kind, (2, 256), seed=2)
    for size in (0, 1, data.nbytes - 1):
        with pytest.raises(ValueError, match=rf"a.gguf: t: truncated .* expected {data.nbytes} bytes .*, got {size}$"):
            blocks.read(kind, data.tobytes()[:size], (2, 256), "a.gguf: t")
    with pytest.raises(ValueError, match=rf"a.gguf: t: expected rows of whole {kind} blocks of {elements}"):
        blocks.read(kind, data, (2 * elements, 256 // elements + 1 if elements == 256 else 16), "a.gguf: t")


@pytest.mark.parametrize("kind", blocks.KINDS)
def test_a_weight_is_about_as_large_as_in_the_file(kind: str) -> None:
    shape = (64, 1024)
    data = random_blocks(kind, shape, seed=3)
    w4 = blocks.read(kind, data, shape, "file: tensor")
    table = 0 if w4.scale_table is None else w4.scale_table.nbytes
    assert w4.nbytes - table <= 1.06 * data.nbytes  # scales of 6 bits take bytes, and d 4
