"""``qlora-ext check`` measures the cost of 4 bits, finds damage, and returns an exit code accordingly."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import qlora_ext
from qlora_app.data import held_out
from qlora_app.main import main
from qlora_app.quantization.advice import advice_on
from qlora_ext.fidelity import CurvePoint, Increase, LayerCost, ModelCheck
from qlora_ext.nn import layers_of
from test_cli_validate_model import change_weights
from tiny_models import make, save_tiny_llama, token_ids

LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A dense model, the same model in both scale forms, and a text."""
    root = tmp_path_factory.mktemp("check")
    save_tiny_llama(root / "dense", seed=3)
    for form in ("qlora_ext", "bitsandbytes"):
        assert main(["quantize", "--model", str(root / "dense"), "--output", str(root / form), "--format", form]) == 0
    (root / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return root


class Checked:
    """The output of the command, and the file that it wrote."""

    def __init__(self, capfd: pytest.CaptureFixture[str], file: pathlib.Path) -> None:
        self._capfd, self._file = capfd, file
        self.out, self.err, self.json = "", "", {}

    def __call__(self, model: pathlib.Path, *options: object, data: pathlib.Path | str) -> int:
        self._file.unlink(missing_ok=True)
        arguments = ["--model", model, "--data", data, "--tokens", 1024, "--json", self._file, *options]
        self._capfd.readouterr()
        status = main(["check", *map(str, arguments)])
        self.out, self.err = self._capfd.readouterr()
        self.json = json.loads(self._file.read_text()) if self._file.exists() else {}
        return status


@pytest.fixture
def check(capfd: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> Checked:
    return Checked(capfd, tmp_path / "found.json")


@pytest.mark.parametrize("form", ["qlora_ext", "bitsandbytes"])
def test_a_sound_model(made: pathlib.Path, check: Checked, form: str) -> None:
    assert check(made / form, "--curve", data=made / "text.txt") == 0
    assert check.json["base"] == str(made / "dense")  # recorded in the directory
    assert check.json["good"] is True
    assert check.json["tokens"] == 1024
    assert len(check.json["layers"]) == 14
    for layer in check.json["layers"]:
        assert layer["error"] == layer["plain_error"]  # the bits are those of plain NF4
        assert 0.05 < layer["error"] < 0.15
        assert layer["loss"] > 0
    assert [point["budget"] for point in check.json["curve"]] == ["0%", "1%", "2%", "5%", "10%", "20%"]
    assert check.json["curve"][0]["increase"] == check.json["increase"]
    assert check.json["curve"][-1]["kept"] > 0
    assert check.json["loss"] - check.json["base_loss"] == pytest.approx(check.json["increase"]["nats"])
    for part in ("in 4 bits", "dense", "nats per token", "costliest of 14 layers", "advice: "):
        assert part in check.out, part


def test_a_dense_model_is_checked_as_it_would_be(made: pathlib.Path, check: Checked) -> None:
    assert check(made / "dense", data="self") == 0
    own = check.json
    assert (own["data"], own["base"], len(own["layers"])) == ("self", str(made / "dense"), 14)
    assert check(made / "dense", data=made / "text.txt") == 0
    dense = check.json
    assert check(made / "qlora_ext", data=made / "text.txt") == 0
    assert {**check.json, "model": ""} == {**dense, "model": ""}


def test_a_calibrated_model(made: pathlib.Path, check: Checked, tmp_path: pathlib.Path) -> None:
    options = ["--calibrate", str(made / "text.txt"), "--calibration-tokens", "512"]
    assert main(["quantize", "--model", str(made / "dense"), "--output", str(tmp_path / "out"), *options]) == 0
    assert check(tmp_path / "out", data=made / "text.txt") == 0
    assert all(layer["error"] < 0.9 * layer["plain_error"] for layer in check.json["layers"])


def test_a_4bit_model_saved_in_another_form(made: pathlib.Path, check: Checked, tmp_path: pathlib.Path) -> None:
    arguments = ["quantize", "--model", str(made / "qlora_ext"), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--format", "bitsandbytes"]) == 0
    assert check(tmp_path / "out", data=made / "text.txt") == 0
    assert check.json["base"] == str(made / "dense")
    assert main([*arguments[:3], "--output", str(tmp_path / "other"), "--keep", "2"]) == 2


def test_without_the_dense_model(made: pathlib.Path, check: Checked, tmp_path: pathlib.Path) -> None:
    model = shutil.copytree(made / "qlora_ext", tmp_path / "model")
    record = model / "quantization.json"
    for content in ({"model": str(tmp_path / "gone")}, {"model": "somebody/model"}, {}):
        record.write_text(json.dumps(content))
        assert check(model, data=made / "text.txt") == 0
        assert "not compared: " in check.out
        assert "--base" in check.out
        assert check.json["increase"] is None
        assert check.json["loss"] > 0
    for option in (["--max-increase", "1"], ["--curve"]):  # without a text this cannot be judged
        assert check(model, *option, data=made / "text.txt") == 2
        assert option[0] in check.err
    record.unlink()
    assert check(model, "--base", made / "dense", data=made / "text.txt") == 0
    assert len(check.json["layers"]) == 14


def test_codes_of_another_model(made: pathlib.Path, check: Checked, tmp_path: pathlib.Path) -> None:
    model = shutil.copytree(made / "qlora_ext", tmp_path / "model")

    def turn(weights: dict[str, torch.Tensor]) -> None:
        weights[f"{LAYER}.weight"] = weights[f"{LAYER}.weight"].flip(0).contiguous()

    change_weights(model, turn)
    assert check(model, data=made / "text.txt") == 3
    assert check.json["good"] is False
    assert f"damaged: {LAYER}: its outputs have a relative error of 1." in check.out
    worse = "quantize again: 1 of 14 layers have a larger error than plain NF4 of the dense model"
    assert f"{worse}, the largest in {LAYER}" in check.out
    worst = {layer["name"]: layer["error"] for layer in check.json["layers"]}
    assert worst[LAYER] > 1 > 0.2 > max(error for name, error in worst.items() if name != LAYER)
    assert check.json["increase"]["nats"] > 0
    assert check(model, "--max-increase", 0, data=made / "text.txt") == 3
    assert "more than --max-increase 0" in check.out
    assert check.json["good"] is False


@pytest.mark.parametrize(
    ("tensor", "value"),
    [("nested_absmax", float("nan")), ("nested_absmax", float("inf")), ("nested_offset", float("nan"))],
)
def test_damaged_scales(made: pathlib.Path, check: Checked, tmp_path: pathlib.Path, tensor: str, value: float) -> None:
    model = shutil.copytree(made / "qlora_ext", tmp_path / "model")
    change_weights(model, lambda weights: weights[f"{LAYER}.{tensor}"].fill_(value))
    assert check(model, data=made / "text.txt") == 2
    assert f"{LAYER}.{tensor}" in check.err


@pytest.mark.parametrize("form", ["qlora_ext", "bitsandbytes"])
def test_two_rows_that_changed_places(made: pathlib.Path, check: Checked, tmp_path: pathlib.Path, form: str) -> None:
    model = shutil.copytree(made / form, tmp_path / "model")

    def exchange(weights: dict[str, torch.Tensor]) -> None:
        rows = weights[f"{LAYER}.weight"].view(64, -1)
        rows[[3, 40]] = rows[[40, 3]]

    change_weights(model, exchange)
    assert check(model, data=made / "text.txt") == 3
    assert "its codes or scales are damaged, or belong to another model" in check.out


@pytest.mark.parametrize(
    ("scale", "told", "with_base"),
    [
        (lambda t: t.fill_(3e38), "scales are NaN or infinite", True),
        (lambda t: t.mul_(1e30), "no model has such weights", True),
        (lambda t: t.mul_(1e30), "no model has such weights", False),
        (torch.zero_, "every scale is zero", True),
    ],
)
def test_impossible_scales(
    made: pathlib.Path, check: Checked, tmp_path: pathlib.Path, scale: Any, told: str, with_base: bool
) -> None:
    model = shutil.copytree(made / "qlora_ext", tmp_path / "model")
    if not with_base:
        (model / "quantization.json").unlink()
    change_weights(model, lambda weights: [scale(weights[f"{LAYER}.nested_{end}"]) for end in ("absmax", "offset")])
    assert check(model, data=made / "text.txt") == 3
    assert f"damaged: {LAYER}: " in check.out
    assert told in check.out
    assert "advice: the model is damaged" in check.out
    assert check.json["problems"]
    assert check.json["good"] is False


def test_quantize_does_not_copy_damage(
    made: pathlib.Path, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(made / "qlora_ext", tmp_path / "model")
    change_weights(model, lambda weights: weights[f"{LAYER}.nested_offset"].fill_(1e30))
    for form in ("qlora_ext", "bitsandbytes"):
        arguments = ["--model", str(model), "--output", str(tmp_path / "out"), "--format", form]
        assert main(["quantize", *arguments]) == 2
        assert f"the model is damaged and was not copied: {LAYER}: " in capfd.readouterr().err
        assert not (tmp_path / "out").exists()


def test_an_adapter_merged_into_the_codes_is_no_damage(
    made: pathlib.Path, check: Checked, tmp_path: pathlib.Path
) -> None:
    """Merging rounds stochastically, which has a larger error than rounding to the nearest code."""
    from qlora_ext.merging.codes import with_update

    model = AutoModelForCausalLM.from_pretrained(made / "qlora_ext", device_map="cpu")
    dense = AutoModelForCausalLM.from_pretrained(made / "dense", device_map="cpu")
    for name, layer in layers_of(model):
        weight = dense.get_submodule(name).weight.detach().float()
        layer.set_weight(with_update(layer.weight4bit, weight))
    model.save_pretrained(tmp_path / "merged")
    shutil.copy(made / "qlora_ext" / "tokenizer.json", tmp_path / "merged")
    shutil.copy(made / "qlora_ext" / "tokenizer_config.json", tmp_path / "merged")
    assert check(tmp_path / "merged", "--base", made / "dense", data=made / "text.txt") == 0
    assert "quantize again, unless an adapter was merged into these 4 bits: 14 of 14 layers" in check.out
    assert "damaged" not in check.out


def test_invalid_arguments_are_rejected(made: pathlib.Path, check: Checked, tmp_path: pathlib.Path) -> None:
    model, text = made / "qlora_ext", made / "text.txt"
    make("qwen2").save_pretrained(tmp_path / "other")
    for options, part in (
        (["--base", made / "qlora_ext"], "--base"),
        (["--base", tmp_path / "none"], "--base"),
        (["--base", tmp_path / "other"], "expected the dense model that --model was quantized from"),
        (["--tokens", 100], "--tokens 100"),
        (["--max-increase", "nan"], "--max-increase nan"),
        (["--max-increase", "-1"], "--max-increase -1"),
        (["--seed", "-1"], "--seed -1"),
        (["--json", tmp_path / "no" / "file"], "--json"),
    ):
        assert check(model, *options, data=text) == 2, options
        assert part in check.err, check.err
        assert check.err.count("\n") == 1
    (tmp_path / "short.txt").write_text("abc")
    assert check(model, data=tmp_path / "short.txt") == 2
    assert "expected a text of at least 32 tokens, got 3" in check.err


def test_the_text_without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: name)
    assert held_out.default_text() == held_out.DEFAULT_DATA
    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert held_out.default_text() == "self"


@pytest.mark.parametrize("form", ["qlora_ext", "bitsandbytes"])
def test_quantize_keeps_layers(made: pathlib.Path, check: Checked, tmp_path: pathlib.Path, form: str) -> None:
    arguments = ["quantize", "--model", str(made / "dense"), "--output", str(tmp_path / "out"), "--format", form]
    assert main([*arguments, "--keep", "20%", "--calibrate", str(made / "text.txt")]) == 0
    record = json.loads((tmp_path / "out" / "quantization.json").read_text())["kept"]
    calibrated = json.loads((tmp_path / "out" / "calibration.json").read_text())["layers"]
    assert record["budget"] == "20%"
    assert record["dense"]
    assert len(record["layers"]) == 14
    names = {layer["name"] for layer in record["layers"]}
    assert {layer["name"] for layer in calibrated} == names - {*record["dense"]}
    assert check(tmp_path / "out", data=made / "text.txt") == 0
    assert {layer["name"] for layer in check.json["layers"]} == names - {*record["dense"]}
    for budget in ("much", "-1"):
        assert main([*arguments, "--overwrite", f"--keep={budget}"]) == 2


def test_results_without_inputs() -> None:
    model = qlora_ext.quantize_model(make(dtype=torch.float32))
    ids = token_ids(4, 16)
    found = qlora_ext.check_model(model, inputs=ids)
    assert found.problems == []
    assert (found.layers, found.increase, found.base_loss) == ([], None, None)
    assert found.loss == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)
    with torch.no_grad():
        model.get_submodule("model.layers.0.input_layernorm").weight[3] = float("inf")
    assert qlora_ext.check_model(model, inputs=ids).problems == [
        "model.layers.0.input_layernorm.weight: has NaN or infinity"
    ]


def test_logits_that_are_not_finite() -> None:
    model = make(dtype=torch.float16)
    with torch.no_grad():
        model.get_submodule("model.norm").weight.fill_(60000)
    found = qlora_ext.check_model(qlora_ext.quantize_model(model), inputs=token_ids(4, 16))
    assert found.problems == ["model: its logits have NaN or infinity on 4 sequences"]
    assert found.loss is None


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"inputs": token_ids(1, 8)}, ValueError, r"B >= 2"),
        ({"inputs": "other"}, ValueError, "inputs: expected 'self'"),
        ({"model": make()}, ValueError, "expected one with 4-bit layers"),
        ({"base": make("gpt2")}, ValueError, "base: expected the dense model that `model` was quantized from"),
        ({"curve": ["much"]}, ValueError, "budget: expected"),
    ],
)
def test_check_model_rejects_invalid_arguments(given: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments = {"model": qlora_ext.quantize_model(make()), "base": make(), "inputs": token_ids(4, 8), **given}
    with pytest.raises(error, match=text):
        qlora_ext.check_model(**arguments)


def test_every_4bit_module_is_compared() -> None:
    """Tied tables and heads are included, and neither model is changed."""
    base = make("qwen2", torch.float32)
    model = qlora_ext.quantize_model(make("qwen2", torch.float32), embeddings=True)
    states = [{key: t.clone() for key, t in m.state_dict().items()} for m in (base, model)]
    found = qlora_ext.check_model(model, base, token_ids(4, 16), curve=[100])
    of = {layer.name: layer for layer in found.layers}
    assert len(of) == 16
    assert 0.05 < of["lm_head"].error < 0.15
    assert 0.05 < of["model.embed_tokens"].error < 0.15
    assert of["lm_head"].extra_bytes == 0 < of["model.embed_tokens"].extra_bytes
    assert isinstance(found.curve[0], CurvePoint)
    for m, state in zip((base, model), states, strict=True):
        assert all(torch.equal(t, state[key]) for key, t in m.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def layers(**changes: float) -> list[LayerCost]:
    found = [LayerCost(f"layer{i}", 0.09, 0.09, 0.01, 1000) for i in range(20)]
    found[7] = LayerCost("layer7", **{"error": 0.09, "plain_error": 0.09, "loss": 0.2, "extra_bytes": 1000, **changes})
    return found


@pytest.mark.parametrize(
    ("increase", "changes", "begins"),
    [
        (Increase(0.2, 0.01), {"loss": 0.01}, ["calibrate"]),
        (Increase(0.2, 0.01), {}, ["calibrate", "keep 1 layers in 16 bits"]),
        (Increase(0.2, 0.2), {}, ["nothing: the increase"]),
        (Increase(0.2, 0.01), {"error": 0.12, "weight_ratio": 2.0, "loss": 0.01}, ["quantize again: 1 of 20 layers"]),
        (Increase(0.2, 0.01), {"error": 0.12, "loss": 0.01}, ["quantize again, unless an adapter was merged"]),
    ],
)
def test_advice_is_based_on_measurements(increase: Increase, changes: dict[str, float], begins: list[str]) -> None:
    checked = ModelCheck([], 4096, 25_000, 3.2, 3.0, increase, layers(**changes))
    assert checked.is_sound == ("weight_ratio" not in changes)
    found = advice_on(checked)
    assert [advice[: len(begin)] for advice, begin in zip(found, begins, strict=True)] == begins


def test_advice_on_a_calibrated_model() -> None:
    """Calibrated on another text, a few layers have a larger error than plain NF4."""
    found = [dataclasses.replace(layer, error=0.07) for layer in layers(loss=0.01)]
    found[7] = dataclasses.replace(found[7], error=0.1)
    checked = ModelCheck([], 4096, 25_000, 3.2, 3.0, Increase(0.2, 0.01), found)
    assert checked.is_calibrated
    assert advice_on(checked)[0].startswith("calibrate on text like this one: on this text 1 of 20 layers")
    assert advice_on(dataclasses.replace(checked, increase=Increase(0.2, 0.2)))[0].startswith("nothing: ")
    found[7] = dataclasses.replace(found[7], weight_ratio=2.0)
    assert advice_on(checked)[0].startswith("quantize again: 1 of 20 layers")


@pytest.mark.parametrize("error", [float("inf"), float("nan")])
def test_a_layer_whose_outputs_are_no_numbers_is_damaged(error: float) -> None:
    found = ModelCheck([], 4096, 25_000, 3.2, 3.0, Increase(0.0, 0.01), layers(error=error, weight_ratio=error))
    assert [layer.name for layer in found.damaged] == ["layer7"]
    assert "damaged, or belong to another model" in advice_on(found)[0]
