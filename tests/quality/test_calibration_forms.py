"""Calibration lowers the error of every format at the same size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qlora_ext
from qlora_ext import Form, quantize
from qlora_ext.calibration import Feedback, calibration_of, encode
from qlora_ext.form import PRESETS

FORMS = {
    **PRESETS,
    "awq": Form("uint4", "float16", 128, offsets="zero_point8"),
    "iq4_nl float32": Form("iq4_nl", "float32"),
    "nf4 bfloat16": Form("nf4", "bfloat16"),
}
EVERY = pytest.mark.parametrize("name", FORMS)


def inputs(k: int = 128) -> torch.Tensor:
    return torch.randn(500, k) @ (torch.randn(k, k) * torch.logspace(-1, 1, k))


@EVERY
@pytest.mark.parametrize("factorize", [True, False])
def test_the_error_of_the_outputs_falls(name: str, factorize: bool) -> None:
    w, x = torch.randn(32, 128) * 0.05, inputs()
    moments = x.T @ x / len(x)
    plain = quantize(w, FORMS[name])
    found = encode(w, moments, Feedback.of(moments, factorize=factorize), plain)
    assert found.weight.form == FORMS[name]
    assert {k: (t.shape, t.dtype) for k, t in found.weight.tensors.items()} == {
        k: (t.shape, t.dtype) for k, t in plain.tensors.items()
    }

    def error_of(w4: qlora_ext.Weight4bit) -> float:
        return ((x @ (w4.dequantize() - w).T).norm() / (x @ w.T).norm()).item()

    assert found.error == pytest.approx(error_of(found.weight), rel=1e-3)
    assert found.absmax_error == pytest.approx(error_of(plain), rel=1e-3)
    assert found.error <= found.absmax_error
    has_offsets = FORMS[name].offsets is not None
    if factorize:
        assert found.error < 0.8 * found.absmax_error
        assert found.method == "feedback"
    elif not has_offsets:
        assert found.error < 0.97 * found.absmax_error
        assert found.method == "scales"
    if has_offsets:  # they are kept
        assert all(torch.equal(found.weight.tensors[k], plain.tensors[k]) for k in ("absmax", "block_offsets"))
    if plain.scale_table is not None:
        assert torch.equal(found.weight.scale_table.nan_to_num(), plain.scale_table.nan_to_num())
        assert found.weight.decoded_scales().isfinite().all()
        assert (found.weight.decoded_scales() > 0).all()


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_the_search_stays_inside_of_the_table(name: str) -> None:
    magnitudes = torch.tensor([2.0**-126, 2.0**-120, 1e-30, 1e-3, 1.0, 1e3, 1e30, 2.0**123])
    w = torch.randn(8, 128) * magnitudes[:, None]
    feedback = Feedback.of(torch.eye(128))
    weight = encode(w, torch.eye(128), feedback, quantize(w, name)).weight
    assert weight.dequantize().isfinite().all()
    assert (weight.decoded_scales() >= 0).all()


@EVERY
def test_a_calibrated_model_of_that_form(name: str) -> None:
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 32))
    model = qlora_ext.quantize_model(model, calibration=[torch.randn(256, 128)], **FORMS[name].keywords)
    assert [layer.form for layer in model] == [FORMS[name]] * 2
    assert all(report.error < report.absmax_error for report in calibration_of(model))
