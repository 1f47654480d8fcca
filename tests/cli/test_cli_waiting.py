"""OUTPUT.weights and OUTPUT.calibration: those of other outputs are left alone, and results stay until OUTPUT is
written."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import qlora_ext
from commands import listing
from qlora_app.main import main
from qlora_app.outputs.lock import locked
from qlora_app.outputs.ownership import MARKER
from qlora_ext.calibration import Calibrator
from qlora_ext.integrations.transformers.spill import Spill
from tiny_models import save_tiny_llama

KINDS = ("weights", "calibration")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("waiting") / "model"
    save_tiny_llama(path, seed=3)
    return path


@pytest.fixture(autouse=True, scope="module")
def short_sequences() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlora_app.quantization.calibrate.LENGTH", 64)
        yield


@pytest.fixture(scope="module")
def whole(model: pathlib.Path, short_sequences: None) -> dict[str, torch.Tensor]:
    """The weights of a calibration that nothing interrupted."""
    assert main(command(model, model.parent / "whole", "calibration")) == 0
    return state(model.parent / "whole")


def command(model: pathlib.Path, output: pathlib.Path, kind: str, *options: str) -> list[str]:
    calibrating = ("--calibrate", "self", "--calibration-tokens", "512") if kind == "calibration" else ()
    return ["quantize", "--model", str(model), "--output", str(output), *calibrating, *options]


def state(path: pathlib.Path) -> dict[str, torch.Tensor]:
    assert qlora_ext
    found: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(path).state_dict()
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


@pytest.fixture
def stopped(
    monkeypatch: pytest.MonkeyPatch, model: pathlib.Path, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> Callable[[str], None]:
    """Runs the command with output tmp_path/out, interrupted by Ctrl-C after nine weights."""

    def run(kind: str) -> None:
        _stop(monkeypatch, model, tmp_path / "out", kind)
        assert "run the same command to resume" in capfd.readouterr().err

    return run


def _stop(monkeypatch: pytest.MonkeyPatch, model: pathlib.Path, output: pathlib.Path, kind: str) -> None:
    owner, name = (Spill, "put") if kind == "weights" else (Calibrator, "refine")
    original, calls = getattr(owner, name), []

    def stopping(*args: Any) -> Any:
        if len(calls) == 9:
            raise KeyboardInterrupt
        calls.append(original(*args))
        return calls[-1]

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopping)
        assert main(command(model, output, kind)) == 130


def test_inputs_are_not_deleted(refused, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Inputs of every option are protected."""
    (tmp_path / "out.calibration").mkdir()
    (tmp_path / "out.calibration" / "calibration.json").write_text('{"text": "what the model is calibrated on"}')
    marker = {"waiting": "calibration", "output": "out"}
    (tmp_path / "out.calibration" / MARKER).write_text(json.dumps(marker))
    (tmp_path / "link.json").symlink_to(tmp_path / "out.calibration" / "calibration.json")
    before = listing(tmp_path)
    for name in ("out.calibration/calibration.json", "link.json"):
        message = refused(*command(model, tmp_path / "out", "", "--calibrate", str(tmp_path / name)))
        assert f"is or holds --calibrate {tmp_path / name}" in message
        assert listing(tmp_path) == before


def test_an_output_inside_of_the_model(
    model: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deleting results inside the model's directory keeps every file of the model."""
    copied = pathlib.Path(shutil.copytree(model, tmp_path / "model"))
    before = listing(copied)
    monkeypatch.chdir(copied)
    for kind in KINDS:
        _stop(monkeypatch, pathlib.Path(), pathlib.Path(kind), kind)
        assert main(command(pathlib.Path(), pathlib.Path(kind), kind)) == 0
        shutil.rmtree(kind)
        assert listing(copied) == before


def test_names_of_one_another(model: pathlib.Path, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A finished output a.weights next to a, and OUTPUT.weights as the output of another process, which locks it."""
    assert main(command(model, tmp_path / "a.weights", "weights")) == 0
    before = listing(tmp_path / "a.weights")
    assert main(command(model, tmp_path / "a", "weights")) == 2
    assert main(command(model, tmp_path / "a", "calibration")) == 0
    assert listing(tmp_path / "a.weights") == before
    with locked(tmp_path / "b.weights"):
        assert main(command(model, tmp_path / "b", "weights")) == 2
        assert f"process {os.getpid()} on" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.weights"]


def test_an_output_inside_the_results(refused, stopped, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    stopped("weights")
    before = listing(tmp_path)
    assert "holds unfinished work" in refused(*command(model, tmp_path / "out.weights" / "inner", "weights"))
    message = refused(*command(model, tmp_path / "out.weights", "weights", "--overwrite"))
    assert "belongs to an unfinished output" in message
    assert listing(tmp_path) == before
    for name in (".partial-new-out-12345678", ".partial-lock-out", ".partial-x/out"):
        assert "reserved for unfinished files" in refused(*command(model, tmp_path / name, "weights"))
    assert listing(tmp_path) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("failure", ["disk", "tokenizer", "crash", "interrupt", "taken"])
def test_results_are_kept_until_the_output_is_written(
    model: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    failure: str,
) -> None:
    """The disk fills up, the command crashes or is interrupted, or the name is taken while the output is written."""
    output = tmp_path / "out"
    save = PreTrainedModel.save_pretrained

    def failing(self: Any, directory: Any, *args: Any, **kwargs: Any) -> None:
        save(self, directory, *args, **kwargs)
        if failure == "taken":
            output.mkdir()
            (output / "thesis.tex").touch()
            return
        errors = {
            "disk": OSError(errno.ENOSPC, "No space left"),
            "tokenizer": Exception("No space left on device (os error 28)"),  # the error of tokenizers
            "crash": RuntimeError("crash"),
        }
        raise errors.get(failure, KeyboardInterrupt())

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", failing)
        status = main(command(model, output, kind))
    printed = "".join(capsys.readouterr())
    assert status == {"disk": 2, "tokenizer": 2, "crash": 1, "interrupt": 130, "taken": 2}[failure], printed
    assert ("is full" in printed) == (failure in ("disk", "tokenizer"))
    done = {"weights": "quantized", "calibration": "calibrated"}[kind]
    assert f"the weights {done} so far are kept in {output}.{kind}" in printed
    if failure == "taken":
        shutil.rmtree(output)
    assert [path.name for path in tmp_path.iterdir()] == [f"out.{kind}"]
    monkeypatch.setattr(Spill if kind == "weights" else Calibrator, "put" if kind == "weights" else "_gather", None)
    assert main(command(model, output, kind)) == 0  # no weight is recomputed
    assert f"an interrupted command has already {done} 14 weights" in capsys.readouterr().out
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_is_full_before_anything_is_calibrated(
    refused, model: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Calibrator, "__init__", no_space)
    message = refused(*command(model, tmp_path / "out", "calibration"))
    assert f"the disk that holds {tmp_path / 'out.calibration'} is full" in message
    assert not list(tmp_path.iterdir())


def damage(store: pathlib.Path, how: str) -> None:
    layers = sorted(path for path in store.glob("*.safetensors") if path.name != "tokens.safetensors")
    if how == "truncated":
        os.truncate(layers[3], layers[3].stat().st_size - 8)
    elif how == "flipped":
        content = bytearray(layers[0].read_bytes())
        content[-5] ^= 4
        layers[0].write_bytes(content)
    elif how == "missing":
        layers[1].unlink()
    elif how == "exchanged":
        sizes = [path.stat().st_size for path in layers]
        a, b = next((a, b) for i, a in enumerate(layers) for b in layers[i + 1 :] if sizes[i] == b.stat().st_size)
        first, second = a.read_bytes(), b.read_bytes()
        a.write_bytes(second)
        b.write_bytes(first)
    elif how == "groups":
        for path in store.glob("*.done"):
            path.write_text("{")
    elif how == "tokens":
        os.truncate(store / "tokens.safetensors", 100)


@pytest.mark.parametrize("how", ["intact", "truncated", "flipped", "missing", "exchanged", "groups", "tokens"])
def test_a_calibration_is_resumed(
    stopped, model: pathlib.Path, whole: dict[str, torch.Tensor], tmp_path: pathlib.Path, how: str
) -> None:
    """Damaged results are calculated again."""
    stopped("calibration")
    assert not (tmp_path / "out").exists()
    damage(tmp_path / "out.calibration", how)
    assert main(command(model, tmp_path / "out", "calibration")) == 0
    assert same(state(tmp_path / "out"), whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("native_bfloat16")
def test_a_calibration_that_cannot_be_resumed_is_an_error(
    refused, stopped, model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    stopped("calibration")
    store = tmp_path / "out.calibration"
    for options, said in (
        (("--block-size", "128"), "another block_size"),
        (("--no-double-quant",), "another double_quant"),
        (("--calibration-seed", "1"), "another seed"),
        (("--calibration-tokens", "1024"), "another tokens"),
        (("--dtype", "float32"), "another model"),
    ):
        message = refused(*command(model, tmp_path / "out", "calibration", *options))
        assert said in message
        assert "delete it to start over" in message
    record = (store / "calibration.json").read_text()
    (store / "calibration.json").write_text(record[:20])
    assert "calibration.json is damaged; delete it" in refused(*command(model, tmp_path / "out", "calibration"))
    (store / "calibration.json").unlink()
    assert "no calibration.json; delete it" in refused(*command(model, tmp_path / "out", "calibration"))
    os.mkfifo(store / "calibration.json")
    assert "holds 'calibration.json', which qlora-ext did not write" in refused(
        *command(model, tmp_path / "out", "calibration")
    )
    (store / "calibration.json").unlink()
    (store / "calibration.json").write_text(record)
    assert main(command(model, tmp_path / "out", "calibration")) == 0
