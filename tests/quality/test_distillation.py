"""Codes that are learnt from the dense model, together or block by block, after a calibration."""

from __future__ import annotations

import copy
import pathlib
from typing import Any

import pytest
import torch

import qlora_ext
from qlora_app.exporting.calibrated import encode
from qlora_ext.calibration import DISTILLED, calibration_of, learning
from qlora_ext.form import Form
from qlora_ext.nn import layers_of
from tensors import same_bits
from tiny_models import logits, make, same_state

FORMATS = ["nf4", "int4", "q4_0", "nvfp4", "mxfp4"]
BY_BLOCK = {"distill": True, "batch_size": 4, "distill_memory": 1}


FOLLOWING = torch.randint(3, 128, (128, 4), generator=torch.Generator().manual_seed(0))


def tokens(seed: int, count: int) -> torch.Tensor:
    """Token ids [count, 32] of a language in which four tokens may follow each token."""
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(3, 128, (count,), generator=generator)]
    while len(columns) < 32:
        columns.append(FOLLOWING[columns[-1], torch.randint(0, 4, (count,), generator=generator)])
    return torch.stack(columns, 1)


TEXT, HELD_OUT = tokens(0, 160), tokens(1, 64)


def strong(family: str) -> Any:
    model = make(family, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    return model


def trained(family: str) -> Any:
    """A model that knows the language a little, and whose blocks change the hidden states so that rounding matters."""
    model = strong(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        batch = tokens(2 + step, 16)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def dense() -> Any:
    return trained("llama")


def form_of(name: str) -> Form:
    return Form() if name == "nf4" else Form.named(name)


def quantized(dense: Any, form: Form, **settings: Any) -> Any:
    calibration = qlora_ext.Calibration(TEXT, **settings)
    return qlora_ext.quantize_model(copy.deepcopy(dense), calibration=calibration, **form.keywords)


def divergence(model: Any, dense: Any) -> float:
    """From the dense model, on a text that the calibration has not seen."""
    exact, found = (logits(m, HELD_OUT).double().log_softmax(-1) for m in (dense, model))
    return float((exact.exp() * (exact - found)).sum(-1).mean())


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_one_by_one_are_closer_to_the_dense_model(dense: Any, name: str) -> None:
    form = form_of(name)
    plain, calibrated = quantized(dense, form, batch_size=4), quantized(dense, form, **BY_BLOCK)
    assert divergence(calibrated, dense) < 0.6 * divergence(plain, dense)
    reports = calibration_of(calibrated)
    assert DISTILLED in {report.method for report in reports if ".layers.0." in report.name}
    assert len(reports) == len({report.name for report in reports}) == 14
    first = dict(layers_of(plain))
    for module, layer in layers_of(calibrated):
        assert layer.form == first[module].form
        assert "forward" not in vars(layer)
    block = [layer for module, layer in layers_of(calibrated) if ".layers.0." in module]
    for layer, before in zip(block, [m for n, m in first.items() if ".layers.0." in n], strict=True):
        found, calibrated_only = (m.packed_weight("weight").tensors for m in (layer, before))
        assert not torch.equal(found.pop("packed"), calibrated_only.pop("packed"))
        assert same_bits(found, calibrated_only)
    assert all(p.grad is None for p in calibrated.parameters())


@pytest.mark.parametrize("name", ["nf4", "q4_0"])
def test_layers_together_are_closer_to_the_dense_model(dense: Any, name: str) -> None:
    form = form_of(name)
    calibrated = quantized(dense, form, batch_size=2)
    together = quantized(dense, form, distill=True, batch_size=2)
    assert divergence(together, dense) < 0.7 * divergence(calibrated, dense)
    assert {report.method for report in calibration_of(together)} == {DISTILLED}
    before = dict(layers_of(calibrated))
    for module, layer in layers_of(together):
        found, calibrated_only = (m.packed_weight("weight").tensors for m in (layer, before[module]))
        assert not torch.equal(found.pop("packed"), calibrated_only.pop("packed"))
        assert same_bits(found, calibrated_only)
        assert "forward" not in vars(layer)
    assert same_state(together, quantized(dense, form, distill=True, batch_size=2))
    assert all(p.grad is None for p in together.parameters())


def test_padding_teaches_nothing(dense: Any) -> None:
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in TEXT.split(4)]
    padded = [{name: torch.nn.functional.pad(t, (0, 5)) for name, t in batch.items()} for batch in batches]
    found, longer = (
        qlora_ext.quantize_model(copy.deepcopy(dense), calibration=qlora_ext.Calibration(given, distill=True))
        for given in (batches, padded)
    )
    assert divergence(longer, dense) == pytest.approx(divergence(found, dense), rel=0.1)


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])  # transposed weights; biases and a tied head
def test_other_families_learn_together(family: str) -> None:
    model = trained(family)
    calibrated = quantized(model, Form(), batch_size=2)
    together = quantized(model, Form(), distill=True, batch_size=2)
    assert {report.method for report in calibration_of(together)} == {DISTILLED}
    assert divergence(together, model) < 0.9 * divergence(calibrated, model)


def test_experts_are_calibrated_only(monkeypatch: pytest.MonkeyPatch) -> None:
    learnt: list[str] = []
    monkeypatch.setattr("qlora_ext.calibration.calibrator.learn", lambda weights, *rest: learnt.extend(weights) or {})
    found = quantized(strong("mixtral"), Form(), distill=True, batch_size=32)
    assert len(learnt) == 8
    assert not [name for name in learnt if "experts" in name]
    assert len(calibration_of(found)) == 12
    assert DISTILLED not in {report.method for report in calibration_of(found)}


@pytest.mark.parametrize("batch", [(TEXT[:4],), {"inputs_embeds": torch.zeros(1, 8, 64)}])
def test_layers_that_learn_together_need_token_ids(dense: Any, batch: Any) -> None:
    with pytest.raises(TypeError, match="inputs: expected token ids to distill a language model, got"):
        qlora_ext.quantize_model(copy.deepcopy(dense), calibration=qlora_ext.Calibration([batch], distill=True))


@pytest.mark.parametrize("size", ["much", 0, -1])
def test_wrong_memory(size: Any) -> None:
    with pytest.raises(ValueError, match="distill_memory: expected a size such as 24GB"):
        qlora_ext.Calibration(TEXT, distill=True, distill_memory=size)


@pytest.mark.parametrize("settings", [BY_BLOCK, {"distill": True, "batch_size": 4}], ids=["blocks", "together"])
@pytest.mark.parametrize("rate", [0.0, 10.0])
def test_codes_that_are_not_better_are_not_taken(
    dense: Any, monkeypatch: pytest.MonkeyPatch, rate: float, settings: dict[str, Any]
) -> None:
    for name in ("BLOCK", "MODEL"):
        monkeypatch.setattr(f"qlora_ext.calibration.calibrator.{name}", learning.Schedule(rate, rate, 2))
    found = quantized(dense, Form(), **settings)
    assert DISTILLED not in {report.method for report in calibration_of(found)}
    monkeypatch.undo()
    assert same_state(found, quantized(dense, Form(), batch_size=4))


def test_one_batch_is_not_enough_to_learn(dense: Any) -> None:
    found = quantized(dense, Form(), distill=True, batch_size=len(TEXT))
    assert DISTILLED not in {report.method for report in calibration_of(found)}


def test_an_interrupted_run_has_the_same_bits(
    dense: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**BY_BLOCK, "batch_size": 8}
    whole = quantized(dense, Form(), **settings)

    def stop(done: int, of: int, name: str) -> None:
        if done == 10:  # in the second block
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantized(dense, Form(), **settings, directory=tmp_path, progress=stop)
    learnt: list[int] = []
    learn = learning.learn
    monkeypatch.setattr(
        "qlora_ext.calibration.calibrator.learn", lambda *arguments: learnt.append(1) or learn(*arguments)
    )
    assert same_state(quantized(dense, Form(), **settings, directory=tmp_path), whole)
    assert learnt == [1]
    with pytest.raises(qlora_ext.untrusted.FileError, match="directory: .* with another"):
        quantized(dense, Form(), directory=tmp_path)


def test_layers_learnt_together_are_stored(dense: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"distill": True, "batch_size": 8}
    whole = quantized(dense, Form(), **settings)

    def stop(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("qlora_ext.calibration.calibrator.learn", stop)
    with pytest.raises(KeyboardInterrupt):
        quantized(dense, Form(), **settings, directory=tmp_path)
    monkeypatch.undo()
    assert same_state(quantized(dense, Form(), **settings, directory=tmp_path), whole)
    monkeypatch.setattr("qlora_ext.calibration.calibrator.learn", stop)
    again = quantized(dense, Form(), **settings, directory=tmp_path)
    assert same_state(again, whole)
    assert calibration_of(again) == calibration_of(whole)
    with pytest.raises(qlora_ext.untrusted.FileError, match="another distill_memory"):
        quantized(dense, Form(), **settings, distill_memory="1GB", directory=tmp_path)


@pytest.mark.parametrize("settings", [BY_BLOCK, {"distill": True}], ids=["blocks", "together"])
@pytest.mark.parametrize("damaged", [False, True])
def test_learning_continues_where_it_stopped(
    dense: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], damaged: bool
) -> None:
    settings = {**settings, "batch_size": 16}
    steps: list[str] = []

    def stop(done: int, of: int, name: str) -> None:
        steps.append(name)
        if name.startswith("learning, step 12 of"):  # after one pass or more: the best codes are stored, too
            raise KeyboardInterrupt

    whole = quantized(dense, Form(), **settings)
    monkeypatch.setattr(learning, "_SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        quantized(dense, Form(), **settings, directory=tmp_path, progress=stop)
    if damaged:
        file = tmp_path / "learning.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    steps.clear()
    again = quantized(dense, Form(), **settings, directory=tmp_path, progress=lambda *state: steps.append(state[2]))
    learning_steps = [step for step in steps if step.startswith("learning")]
    assert learning_steps[0].startswith(f"learning, step {1 if damaged else 13} of")
    assert same_state(again, whole)
    assert calibration_of(again) == calibration_of(whole)


def test_exported_weights_are_learnt_too(dense: Any) -> None:
    model = copy.deepcopy(dense)
    names = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in name]
    form = Form.named("q4_0")
    calibration = qlora_ext.Calibration(TEXT, distill=True, batch_size=2)
    weights, report = encode(model, [[name] for name in names], form, calibration)
    assert DISTILLED in {one.method for one in report}
    for name, w4 in weights.items():
        assert torch.equal(model.get_submodule(name).weight, w4.dequantize(torch.float32))
    assert divergence(model, dense) < 0.7 * divergence(quantized(dense, form), dense)


def test_adapters_are_rejected(dense: Any) -> None:
    with pytest.raises(ValueError, match="init_lora: expected none with distill"):
        qlora_ext.quantize_model(
            copy.deepcopy(dense), calibration=qlora_ext.Calibration(TEXT, distill=True), init_lora="svd"
        )
