"""Fingerprints, checks for damage, planned memory and the fidelity of models in other formats than NF4."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import qlora_ext
from forms import MODULE_FORMS as FORMS
from forms import random_weight
from qlora_app import planning
from qlora_app.planning.memory import build
from qlora_ext.fidelity.integrity import problems_of
from qlora_ext.fingerprint import fingerprint
from qlora_ext.form import PRESETS
from qlora_ext.nn import Linear4bit
from tiny_models import CONFIGS, make

EVERY = pytest.mark.parametrize("name", FORMS)


def layer_of(name: str, seed: int = 0) -> nn.Module:
    layer = Linear4bit(64, 48, False, **FORMS[name].keywords)
    layer.set_weight(random_weight(FORMS[name], (48, 64), seed))
    return nn.ModuleDict({"layer": layer})


def test_every_form_has_a_fingerprint_of_its_own() -> None:
    assert len({fingerprint(layer_of(name)) for name in FORMS}) == len(FORMS)
    models = [nn.ModuleDict({"layer": Linear4bit(64, 48, False, code=c, scales="float16")}) for c in ("int4", "iq4_nl")]
    assert fingerprint(models[0]) != fingerprint(models[1])  # of the same bytes


def test_fingerprints_of_nf4_are_those_they_were() -> None:
    torch.manual_seed(0)
    w = torch.arange(48 * 64, dtype=torch.float32).sin().view(48, 64)
    model = nn.ModuleDict({"layer": Linear4bit(64, 48, False)})
    model.layer.set_weight(qlora_ext.quantize_nf4(w))
    assert fingerprint(model) == NF4_FINGERPRINT


NF4_FINGERPRINT = "b43973a54473b6cca070e48dad6d28b8e1506b0db4356f158f7c0d8a5dfc3392"


@EVERY
def test_every_tensor_counts(name: str) -> None:
    model = layer_of(name)
    before = fingerprint(model)
    assert fingerprint(copy.deepcopy(model)) == before
    for key, t in model.layer.packed_state().items():
        bits = t.detach().reshape(-1).view(torch.uint8).numpy()
        bits[-1] ^= 1
        assert fingerprint(model) != before, key
        bits[-1] ^= 1
    assert fingerprint(model) == before


@EVERY
def test_damage_is_found(name: str) -> None:
    model = layer_of(name)
    assert problems_of(model) == []
    scales = model.layer.absmax.numel()
    for key, t in model.layer.packed_state().items():
        if t.dtype == torch.uint8:
            continue
        damaged = copy.deepcopy(model)
        getattr(damaged.layer, key).data.reshape(-1)[:] = float("inf")
        (problem, *others) = problems_of(damaged)
        kind = "offsets" if key in ("block_offsets", "offset_scale") else "scales"
        assert problem.startswith("layer: ")
        assert problem.endswith(f"of {scales} {kind} are NaN or infinite"), problem
        assert len(others) <= 1
    empty = nn.ModuleDict({"layer": Linear4bit(64, 48, False, **FORMS[name].keywords)})
    assert problems_of(empty) == ["layer: every scale is zero: nothing was loaded into it"]


def test_codes_of_nan_are_found() -> None:
    model = layer_of("fp8")
    model.layer.weight.packed[3, :2] = torch.tensor([0x7F, 0xFF], dtype=torch.uint8)
    assert problems_of(model) == ["layer: 2 of 3072 codes are NaN or infinite"]


def test_scales_that_no_model_has_are_found() -> None:
    model = layer_of("q4_1")
    model.layer.set_weight(random_weight(FORMS["float32 offsets"], (48, 64)))
    model.layer.block_offsets.data[3] = -1e6
    assert problems_of(model) == ["layer: 1 of 48 offsets are above 65504, up to 1e+06: no model has such weights"]


@pytest.mark.parametrize("name", PRESETS)
def test_planned_weights_have_the_size_of_real_ones(name: str) -> None:
    form = dataclasses.replace(PRESETS[name], block_size=min(64, PRESETS[name].block_size))
    planned = build(planning.Job(CONFIGS["llama"](), dtype="bfloat16", form=form), 2)
    model = qlora_ext.quantize_model(make("llama"), **form.keywords)
    expected = {key: (t.shape, t.dtype) for key, t in model.state_dict().items()}
    names = {key: key.removeprefix("base_model.model.").replace(".base_layer", "") for key in planned.state_dict()}
    found = {names[key]: t for key, t in planned.state_dict().items()}
    assert {key: (t.shape, t.dtype) for key, t in found.items() if "lora_" not in key} == expected


@pytest.mark.parametrize("name", ["mxfp4", "q4_0"])
def test_a_model_is_compared_with_plain_nf4(name: str) -> None:
    dense = make("llama", torch.float32)
    model: Any = qlora_ext.quantize_model(copy.deepcopy(dense), **PRESETS[name].keywords)
    ids = torch.randint(0, 128, (3, 16))
    found = qlora_ext.check_model(model, dense, ids)
    assert found.is_sound
    assert len(found.layers) == 14
    assert all(0.5 < layer.error / layer.plain_error < 1.6 for layer in found.layers)
    costs = qlora_ext.sensitivity(dense, ids, **PRESETS[name].keywords)
    assert [cost.error for cost in costs.layers] == pytest.approx([layer.error for layer in found.layers])
