"""Calibration of a model on CUDA copies nothing to the CPU, and gives the same result as on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch

import qlora_ext
import tiny_models
from qlora_ext.calibration import Calibration, calibration_of

pytestmark = pytest.mark.cuda


def test_a_model_is_calibrated_as_on_the_cpu() -> None:
    dense = tiny_models.make("llama", torch.float32)
    tokens = torch.randint(3, 128, (4, 24))
    reports, logits = [], []
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(dense).to(device)
        model = qlora_ext.quantize_model(model, calibration=Calibration(tokens.to(device)))
        assert {t.device.type for t in model.state_dict().values()} == {device}
        reports.append(calibration_of(model))
        with torch.no_grad():
            logits.append(model(tokens.to(device)).logits.cpu())
    for cpu, cuda in zip(*reports, strict=True):
        assert (cuda.name, cuda.method, cuda.tokens) == (cpu.name, cpu.method, cpu.tokens)
        assert cuda.error == pytest.approx(cpu.error, rel=0.02)
        assert cuda.error < cuda.absmax_error
    assert "feedback" in {report.method for report in reports[1]}
    # They differ where rounding of the moments changed a code.
    assert (logits[0] - logits[1]).norm() < 0.1 * logits[0].norm()
