"""``qlora-ext merge``, ``export --to nf4`` and ``quantize --format bitsandbytes``, on the run of commands.py."""

from __future__ import annotations

import json
import math
import pathlib
import re

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="PEFT is not installed")

import qlora_app
from commands import Paths, here, listing


def test_merge_to_4bit_prints_its_error(
    paths: Paths, finished_run: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    losses = {}
    for kind, options in {"dense": [], "4bit": ["--4bit"]}.items():
        output = paths["root"] / f"merged_{kind}"
        here("merge", "--adapter", finished_run, "--output", output, "--dtype", "float32", "--evaluate", *options)
        printed = capfd.readouterr().out
        numbers = re.search(r"held-out loss: ([\d.]+) unmerged, ([\d.]+) merged", printed)
        assert numbers
        losses[kind] = [float(number) for number in numbers.groups()]
    assert losses["dense"][0] == losses["4bit"][0]
    assert abs(losses["dense"][1] - losses["dense"][0]) < 2e-4
    assert 0 < abs(losses["4bit"][1] - losses["4bit"][0]) < 0.05
    metrics = json.loads((finished_run / "adapter" / "qlora_run.json").read_text())["metrics"]
    assert abs(math.log(metrics["perplexity_after"]) - losses["dense"][0]) < 0.01  # the run's compute dtype, bfloat16

    error = json.loads((output / "merge_error.json").read_text())
    assert len(error["by_layer"]) == 14
    assert f"{error['total']:.2%} of the merged weights' norm" in printed
    assert f"at most {max(error['by_layer'].values()):.2%} in " in printed
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.quantization_config.quant_method == "qlora_ext"


def test_an_adapter_on_the_embeddings_and_the_head(paths: Paths, tmp_path: pathlib.Path) -> None:
    from safetensors.torch import load_file

    run, output = tmp_path / "run", tmp_path / "merged"
    here(
        "finetune", "--model", paths["model"], "--data", paths["data"], "--output", run, "--max-steps", "2",
        "--seq-len", "32", "--batch-size", "2", "--eval-size", "4", "--target-modules", "embed_tokens,lm_head,q_proj",
    )  # fmt: skip
    here("generate", "--adapter", run, "--prompt", "count 3", "--max-new-tokens", "2", "--dtype", "float32")
    here("merge", "--adapter", run, "--output", output, "--dtype", "float32")
    assert {t.dtype for t in load_file(output / "model.safetensors").values()} == {torch.float32}


def test_quantize_for_bitsandbytes(paths: Paths) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM

    here("quantize", "--model", paths["model"], "--output", paths["root"] / "bnb", "--format", "bitsandbytes")
    model = AutoModelForCausalLM.from_pretrained(paths["root"] / "bnb")
    assert sum(isinstance(m, bnb.nn.Linear4bit) for m in model.modules()) == 14


def test_merging_a_merge_aware_adapter_changes_no_loss(
    paths: Paths, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, output = tmp_path / "run", tmp_path / "merged"
    here(
        "finetune", "--model", paths["model"], "--data", paths["data"], "--output", run, "--max-steps", "3",
        "--seq-len", "32", "--batch-size", "2", "--eval-size", "4", "--merge-aware", "--dtype", "float32",
    )  # fmt: skip
    settings = json.loads((run / "settings.json").read_text())
    assert (settings["merge_aware"], settings["dropout"]) == ("base", 0.0)
    capfd.readouterr()
    here("merge", "--adapter", run, "--output", output, "--4bit", "--dtype", "float32", "--evaluate")
    printed = capfd.readouterr().out
    assert re.search(r"held-out loss: ([\d.]+) unmerged, \1 merged \(\+0.0000\)", printed), printed
    retained = re.search(r"the codes retain ([\d.]+)% of the adapter's update", printed)
    assert retained
    assert 50 < float(retained[1]) < 150


def test_merge_to_4bit_calibrated(
    paths: Paths, finished_run: pathlib.Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_app.quantization.calibrate.LENGTH", 64)
    output = paths["root"] / "merged_calibrated"
    options = "--4bit", "--calibrate", "self", "--calibration-tokens", "1024", "--evaluate", "--dtype", "float32"
    here("merge", "--adapter", finished_run, "--output", output, *options)
    printed = capfd.readouterr().out
    assert "calibrated 14 weights: the error of their outputs is 0." in printed
    numbers = re.search(r"held-out loss: ([\d.]+) unmerged, ([\d.]+) merged", printed)
    assert numbers
    assert abs(float(numbers[1]) - float(numbers[2])) < 0.05
    assert len(json.loads((output / "calibration.json").read_text())["layers"]) == 14
    assert not (paths["root"] / "merged_calibrated.calibration").exists()
    with pytest.raises(AssertionError):
        here("merge", "--adapter", finished_run, "--output", paths["root"] / "no", "--calibrate", "self")
    assert "--calibrate needs --4bit" in capfd.readouterr().err


def test_a_4bit_merge_is_an_export_to_nf4(
    paths: Paths, finished_run: pathlib.Path, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("qlora_app.quantization.calibrate.LENGTH", 64)
    calibrated = {"calibrate": str(paths["data"]), "calibration_tokens": 512}
    for name, more, record in (("plain", {}, "merge_error.json"), ("calibrated", calibrated, "calibration.json")):
        merged, exported = tmp_path / f"{name} merged", tmp_path / f"{name} exported"
        options = [item for key, value in more.items() for item in (f"--{key.replace('_', '-')}", value)]
        here("merge", "--adapter", finished_run, "--output", merged, "--4bit", *options)
        assert "MB in 4 bits" in capfd.readouterr().out
        qlora_app.export(adapter=finished_run, to="nf4", output=exported, **more)
        printed = capfd.readouterr().out
        assert "MB in nf4" in printed
        assert re.search(r"loss on .* trained, .* exported", printed)
        one, other = ({**listing(path), "qlora_output.json": None} for path in (merged, exported))
        assert one == other
        assert record in one
        commands = [json.loads((path / "qlora_output.json").read_text())["command"] for path in (merged, exported)]
        assert commands == ["merge", "export"]


def test_nf4_without_an_adapter_is_what_quantize_writes(paths: Paths, tmp_path: pathlib.Path) -> None:
    here("quantize", "--model", paths["model"], "--output", tmp_path / "one")
    here("export", "--model", paths["model"], "--to", "nf4", "--check", "none", "--output", tmp_path / "other")
    one, other = ({**listing(tmp_path / name), "qlora_output.json": None} for name in ("one", "other"))
    assert one == other
