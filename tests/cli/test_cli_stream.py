"""``finetune --stream``, and quantizing to a 4-bit directory without the model in memory."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import signal
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qlora_ext
from commands import here, stopped
from forks import Command
from gguf_files import four_bit_file, llama_file
from qlora_app.main import main
from qlora_app.models import Loader
from qlora_app.planning import families, search
from qlora_app.planning.blocks import place, streamed
from qlora_app.planning.memory import peaks, split
from qlora_app.training import fitting
from qlora_app.training.fitting import job_of
from qlora_app.training.settings import Settings
from qlora_app.training.trainer import RunTrainer
from qlora_ext.integrations.transformers import spill
from qlora_ext.streaming import streaming_of
from tiny_models import same_state, save_tiny_llama

__all__ = ["four_bit_file", "llama_file"]  # fixtures


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("dense")
    save_tiny_llama(path, seed=0)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"line {i} of a text to learn"}) + "\n" for i in range(24)))
    return path


OPTIONS = ("--seq-len", "32", "--eval-size", "4", "--max-steps", "3", "--batch-size", "2", "--save-steps", "1")


def tuned(model: pathlib.Path, data: pathlib.Path, output: pathlib.Path, *options: str) -> dict[str, torch.Tensor]:
    command = ["finetune", "--model", str(model), "--data", str(data), "--output", str(output), "--device", "cpu"]
    assert main([*command, *OPTIONS, *options]) == 0
    return adapter_of(output)


@pytest.fixture(scope="module")
def resident_run(dense: pathlib.Path, data: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run that does not stream. Tests only read it."""
    run = tmp_path_factory.mktemp("resident") / "run"
    tuned(dense, data, run)
    return run


def adapter_of(run: pathlib.Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def losses(output: pathlib.Path) -> list[float]:
    lines = (json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines())
    return [line.get("loss", line.get("eval_loss")) for line in lines]


def test_a_streamed_run_is_the_resident_one(
    dense: pathlib.Path, data: pathlib.Path, resident_run: pathlib.Path, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    expected = adapter_of(resident_run)
    seen = []
    load = Loader.while_loading

    def loaded(self: Loader, *args: Any, **kwargs: Any) -> Any:
        model = load(self, *args, **kwargs)
        seen.append(streaming_of(model))
        return model

    monkeypatch.setattr(Loader, "while_loading", loaded)
    found = tuned(dense, data, tmp_path / "run", "--stream", "disk", "--resident", "1GB")
    assert [streaming is not None for streaming in seen] == [False, True]  # the 4-bit directory is written first
    assert same(found, expected)
    assert losses(tmp_path / "run") == losses(resident_run)
    assert (tmp_path / "run-base" / "model.safetensors").is_file()
    # The next run uses the 4-bit directory, which is a complete model.
    changed = (tmp_path / "run-base" / "model.safetensors").stat().st_mtime_ns
    assert same(tuned(dense, data, tmp_path / "run", "--stream", "disk", "--overwrite"), expected)
    assert (tmp_path / "run-base" / "model.safetensors").stat().st_mtime_ns == changed
    assert same(tuned(tmp_path / "run-base", data, tmp_path / "again", "--stream", "disk"), expected)
    assert not (tmp_path / "again-base").exists()
    assert same(tuned(dense, data, tmp_path / "ram", "--stream", "ram", "--grad-checkpointing"), expected)


def test_a_resumed_run_may_stream(resident_run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run = stopped(resident_run, tmp_path, 2)
    assert main(["finetune", "--output", str(run), "--resume", "--stream", "disk"]) == 0
    assert same(adapter_of(run), adapter_of(resident_run))


def test_the_options_for_long_contexts_change_no_result(
    dense: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    plain = "--dtype", "float32", "--dropout", "0"
    expected = tuned(dense, data, tmp_path / "plain", *plain)
    offloaded = tuned(dense, data, tmp_path / "off", *plain, "--grad-checkpointing", "--offload-checkpoints")
    assert same(offloaded, expected)
    chunked = tuned(dense, data, tmp_path / "chunked", *plain, "--mlp-chunk", "8")
    assert chunked.keys() == expected.keys()
    for name, t in expected.items():  # the gradients of the adapters are summed chunk by chunk
        torch.testing.assert_close(chunked[name], t, rtol=1e-3, atol=1e-5)


def test_foreign_files_next_to_the_run_are_not_changed(
    dense: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run-base").mkdir()
    (tmp_path / "run-base" / "diary.txt").write_text("dear diary")
    command = ["finetune", "--model", str(dense), "--data", str(data), "--output", str(tmp_path / "run"), *OPTIONS]
    assert main([*command, "--stream", "disk"]) != 0
    assert "run-base exists and is not empty" in capsys.readouterr().err
    assert (tmp_path / "run-base" / "diary.txt").read_text() == "dear diary"


def quantize(dense: pathlib.Path, output: pathlib.Path) -> list[str]:
    return ["quantize", "--model", str(dense), "--output", str(output)]


def resident(dense: pathlib.Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(dense, quantization_config=qlora_ext.QLoRAConfig())


def test_quantize_leaves_nothing_but_the_model(dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert main(quantize(dense, tmp_path / "out")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), resident(dense))


def killed_at_the_sixth_weight() -> None:
    """Kills this process after it has written half of the sixth weight."""
    put, kept = spill.Spill.put, []

    def killing(self: Any, name: str, w4: Any) -> None:
        if len(kept) == 5:
            (self.directory / f".partial-new-{'0' * 32}.safetensors-01234567").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        kept.append(put(self, name, w4))

    spill.Spill.put = killing


@pytest.mark.parametrize("source", ["dense", "llama_file", "four_bit_file"])
def test_a_killed_quantize_is_resumed(
    source: str, request: pytest.FixtureRequest, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = request.getfixturevalue(source)
    command = quantize(model, tmp_path / "out")
    assert Command(*command, before=killed_at_the_sixth_weight).wait().returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    made: list[str] = []
    put = spill.Spill.put
    monkeypatch.setattr(spill.Spill, "put", lambda self, name, w4: (made.append(name), put(self, name, w4))[1])
    assert main(command) == 0
    assert "has already quantized 5 weights" in capsys.readouterr().out
    assert source == "four_bit_file" or len(made) == 14 - 5
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert main(quantize(model, tmp_path / "whole")) == 0
    load = AutoModelForCausalLM.from_pretrained
    assert same_state(load(tmp_path / "out"), load(tmp_path / "whole"))


def test_results_of_another_checkpoint_are_not_used(dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    save_tiny_llama(other, seed=1)
    command = quantize(dense, tmp_path / "out")
    Command(*command, before=killed_at_the_sixth_weight).wait()
    assert (tmp_path / "out.weights").is_dir()
    assert main(quantize(other, tmp_path / "out")) == 0
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), resident(other))


def test_a_full_disk_keeps_the_results(
    dense: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save, saved = spill.save_file, []

    def full(*args: Any) -> None:
        if len(saved) == 4:
            raise OSError(28, "No space left on device")
        saved.append(save(*args))

    monkeypatch.setattr(spill, "save_file", full)
    assert main(quantize(dense, tmp_path / "out")) != 0
    printed = capsys.readouterr().err
    assert "the disk that holds" in printed
    assert "the weights quantized so far are kept" in printed
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(spill, "save_file", save)
    assert main(quantize(dense, tmp_path / "out")) == 0
    assert "has already quantized 4 weights" in capsys.readouterr().out


def test_a_damaged_weight_is_quantized_again(dense: pathlib.Path, tmp_path: pathlib.Path) -> None:
    command = quantize(dense, tmp_path / "out")
    Command(*command, before=killed_at_the_sixth_weight).wait()
    for i, file in enumerate((tmp_path / "out.weights").glob("*.safetensors")):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content if i % 2 else content[:-1])
    assert main(command) == 0
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), resident(dense))


def test_a_base_that_is_cut_short_under_a_run_is_a_sentence(
    dense: pathlib.Path, data: pathlib.Path, resident_run: pathlib.Path, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    base = tmp_path / "run-base" / "model.safetensors"
    save = finetune_trainer()._save_checkpoint
    kept: list[bytes] = []

    def cutting(self: Any, *args: Any) -> None:
        save(self, *args)
        if not kept:
            kept.append(base.read_bytes())
            os.truncate(base, 1000)

    monkeypatch.setattr(finetune_trainer(), "_save_checkpoint", cutting)
    command = ["finetune", "--model", str(dense), "--data", str(data), "--output", str(tmp_path / "run"), *OPTIONS]
    assert main([*command, "--stream", "disk", "--device", "cpu"]) != 0
    assert "model.safetensors: truncated while in use: 1000 of" in capsys.readouterr().err
    base.write_bytes(kept[0])
    assert main(["finetune", "--output", str(tmp_path / "run"), "--resume"]) == 0
    assert same(adapter_of(tmp_path / "run"), adapter_of(resident_run))


def finetune_trainer() -> Any:
    return RunTrainer


@pytest.mark.usefixtures("native_bfloat16")
def test_a_run_fits_itself_into_the_memory(
    dense: pathlib.Path, data: pathlib.Path, resident_run: pathlib.Path, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(fitting, "_overhead", lambda device: 1e6)
    expected = tuned(dense, data, tmp_path / "as_it_is")
    roomy = tuned(dense, data, tmp_path / "roomy", "--max-memory", "10GB")
    assert "fits into 10GB (0.00 GB of it used by Python and its libraries) with no option" in capsys.readouterr().out
    assert same(roomy, expected)
    sizes = []
    for options in ((), ("--chunked-loss",), ("--chunked-loss", "--grad-checkpointing")):
        planned = json.loads(plan_of(dense, "--device", "cpu", *options))
        sizes.append(planned["total"] - planned["bytes"]["process"])
    assert sizes[0] > sizes[2]
    allowed = str(int(sizes[2] * 1.01 + 1e6))
    narrow = tuned(dense, data, tmp_path / "narrow", "--max-memory", allowed)
    printed = capsys.readouterr().out
    assert f"fits into {allowed}" in printed
    settings = json.loads((tmp_path / "narrow" / "settings.json").read_text())
    assert settings["grad_checkpointing"]
    assert settings["stream"] == "none"
    assert narrow.keys() == expected.keys()
    assert main(["finetune", "--output", str(tmp_path / "narrow"), "--resume"]) == 0  # without a new choice
    assert "fits into" not in capsys.readouterr().out


def plan_of(model: pathlib.Path, *options: str) -> str:
    return here("plan", "--model", model, "--seq-len", "32", "--batch-size", "2", "--json", *options)


def test_a_run_that_cannot_fit_reports_what_would(
    dense: pathlib.Path,
    data: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fitting, "_overhead", lambda device: 1e6)
    command = ["finetune", "--model", str(dense), "--data", str(data), "--output", str(tmp_path / "run"), *OPTIONS]
    assert main([*command, "--max-memory", "1500KB"]) != 0
    printed = capsys.readouterr().err
    assert "--max-memory 1500KB" in printed
    assert "2 rows of 32 tokens need at least 0.00 GB (" in printed
    assert "--stream disk" in printed
    assert not (tmp_path / "run").exists()


def test_the_ring_uses_the_remaining_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "_overhead", lambda device: 1e6)
    config = families.config_of_sizes("hidden=256,intermediate=768,layers=10,heads=4,kv-heads=2,vocab=512")
    options = {"seq_len": 64, "batch_size": 1, "rank": 2, "grad_checkpointing": True, "chunked_loss": True}
    settings = Settings(max_memory="1GB", **options)
    resident = search.total(dataclasses.replace(job_of(settings, config), host=True), None)
    layer = streamed(job_of(settings, config)).largest
    for memory, stream in ((resident + 1, "none"), (resident - 3 * layer, "disk")):
        asked = dataclasses.replace(settings, max_memory=str(int(memory + 1e6)))
        fitted, line = fitting.fit(asked, config, None, torch.device("cpu"))
        assert fitted.stream == stream
        assert ("--stream disk" in line) == (stream == "disk")
    job = dataclasses.replace(job_of(fitted, config), host=True)
    parts, slots = place(split(job, peaks(job)), streamed(job), float(fitted.resident))
    assert slots == 6  # not 7, because of the padding between tensors in the ring
    assert memory - layer < sum(parts.values()) <= memory
