"""Weights that compressed-tensors wrote decode to the bits that it decodes, and are written as it wrote them."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest
import torch

from qlora_ext.checkpoints import format_of, retained_of

DATA = pathlib.Path(__file__).parents[1] / "data"
GOLDEN = np.load(DATA / "compressed_tensors.npz")
CASES = json.loads((DATA / "compressed_tensors.json").read_text())["cases"]


def golden(name: str) -> torch.Tensor:
    """The array ``name``, whose dtype may follow its name in the file."""
    key = next(key for key in GOLDEN.files if key.partition("@")[0] == name)
    t = torch.from_numpy(GOLDEN[key])
    dtype = key.partition("@")[2]
    return t.view(getattr(torch, dtype)) if dtype else t


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_a_weight_is_decoded_and_written_as_by_its_library(case: dict[str, Any]) -> None:
    name = case["name"]
    kind, settings = format_of(case["config"])
    tensors = {key: golden(f"{name}.{key}") for key in case["tensors"]}
    expected = golden(f"{name}!decompressed")
    w4 = kind.read(tensors, case["shape"], expected.dtype, settings, name)
    assert torch.equal(bits(w4.dequantize(torch.float32)), bits(golden(f"{name}!float32")))
    assert torch.equal(bits(w4.dequantize()), bits(expected))
    written = kind.write(w4, settings, retained_of(kind, tensors))
    assert written.keys() == tensors.keys()
    for key, t in tensors.items():
        assert (written[key].dtype, written[key].shape) == (t.dtype, t.shape)
        assert torch.equal(bits(written[key]), bits(t)), key
