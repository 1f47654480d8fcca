"""``qlora-ext export`` and ``qlora_app.export`` to model directories, and what they reject."""

from __future__ import annotations

import json
import pathlib
import shutil
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

for library in ("transformers", "peft", "gguf"):
    pytest.importorskip(library, reason=f"{library} is not installed")

import qlora_app
from commands import Paths, here, listing
from gguf_files import llama_file as llama_file

Refused = Callable[..., str]
EXPORT = ("export", "--check", "none")


def tensors(directory: pathlib.Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = load_file(directory / "model.safetensors")
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def never(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("weights were read")


def test_dense_is_what_merge_writes(
    paths: Paths, finished_run: pathlib.Path, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    here("merge", "--adapter", finished_run, "--output", tmp_path / "merged")
    capfd.readouterr()
    here(*EXPORT, "--adapter", finished_run, "--to", "dense", "--output", tmp_path / "exported")
    out = capfd.readouterr().out
    assert f"{tmp_path / 'exported'} needs about " in out
    assert "MB in dense" in out
    assert same(tensors(tmp_path / "exported"), tensors(tmp_path / "merged"))
    one, other = listing(tmp_path / "exported"), listing(tmp_path / "merged")
    assert {n: c for n, c in one.items() if n != "qlora_output.json"} == {
        n: c for n, c in other.items() if n != "qlora_output.json"
    }
    here(*EXPORT, "--model", paths["model"], "--to", "dense", "--output", tmp_path / "copy")
    assert same(tensors(tmp_path / "copy"), tensors(paths["model"]))


def test_dense_decodes_4bit_models(
    paths: Paths, llama_file: pathlib.Path, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    here("quantize", "--model", paths["model"], "--output", tmp_path / "4bit")
    here(*EXPORT, "--model", tmp_path / "4bit", "--to", "dense", "--output", tmp_path / "decoded")
    decoded = AutoModelForCausalLM.from_pretrained(tmp_path / "decoded")
    assert getattr(decoded.config, "quantization_config", None) is None
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "4bit").dequantize()
    assert same(decoded.state_dict(), expected.state_dict())
    here(*EXPORT, "--model", llama_file, "--to", "dense", "--dtype", "float32", "--output", tmp_path / "from_gguf")
    read = AutoModelForCausalLM.from_pretrained(llama_file.parent, gguf_file=llama_file.name, dtype=torch.float32)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "from_gguf").state_dict(), read.state_dict())


def test_bitsandbytes_holds_the_merged_codes(
    paths: Paths, finished_run: pathlib.Path, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    here("merge", "--adapter", finished_run, "--output", tmp_path / "merged", "--4bit")
    capfd.readouterr()
    here(*EXPORT, "--adapter", finished_run, "--to", "bitsandbytes", "--output", tmp_path / "exported")
    assert "of the adapter's update" in capfd.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dequantize()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        assert (exported(ids).logits.float() - merged(ids).logits.float()).abs().max() < 0.02


def test_bitsandbytes_without_an_adapter_is_what_quantize_writes(paths: Paths, tmp_path: pathlib.Path) -> None:
    here("quantize", "--model", paths["model"], "--output", tmp_path / "one", "--format", "bitsandbytes")
    here(*EXPORT, "--model", paths["model"], "--to", "bitsandbytes", "--output", tmp_path / "other")
    assert same(tensors(tmp_path / "one"), tensors(tmp_path / "other"))
    assert listing(tmp_path / "one").keys() == listing(tmp_path / "other").keys()


def test_python_does_what_the_command_does(
    paths: Paths, finished_run: pathlib.Path, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    here(*EXPORT, "--adapter", finished_run, "--to", "dense", "--output", tmp_path / "one")
    found = qlora_app.export(adapter=finished_run, to="dense", output=tmp_path / "other")
    assert found == tmp_path / "other"
    assert listing(tmp_path / "one") == listing(tmp_path / "other")
    with pytest.raises(ValueError, match=r"^output .* exists and is not empty; name another directory, or add overw"):
        qlora_app.export(adapter=finished_run, to="dense", output=tmp_path / "other")
    qlora_app.export(model=paths["model"], to="dense", output=tmp_path / "other", overwrite=True)
    assert same(tensors(tmp_path / "other"), tensors(paths["model"]))
    with pytest.raises(ValueError, match=r"^to onnx: expected one of dense, "):
        qlora_app.export(adapter=finished_run, to="onnx", output=tmp_path / "no")
    with pytest.raises(TypeError, match=r"^export\(\) got an unexpected keyword argument 'adaptor'"):
        qlora_app.export(adaptor=finished_run, to="dense", output=tmp_path / "no")
    with pytest.raises(TypeError, match="^export: expected overwrite to be "):
        qlora_app.export(adapter=finished_run, to="dense", output=tmp_path / "no", overwrite="no")


def test_nothing_is_written_before_the_checks(
    refused: Refused, paths: Paths, finished_run: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_app.models.loading.Loader.while_loading", never)
    monkeypatch.setattr("qlora_app.exporting.model_directories.load_dense", never)
    output = tmp_path / "out" / "model"
    to = ["--output", output, "--to"]
    assert "expected an adapter (--adapter) or a model (--model)" in refused("export", *to, "dense")
    assert "did you mean bitsandbytes?" in refused("export", "--model", paths["model"], *to, "bitsandbites")

    prompts = tmp_path / "prompts"
    shutil.copytree(finished_run / "adapter", prompts)
    (prompts / "qlora_run.json").unlink()
    config = json.loads((prompts / "adapter_config.json").read_text())
    (prompts / "adapter_config.json").write_text(
        json.dumps({"peft_type": "PROMPT_TUNING", "base_model_name_or_path": config["base_model_name_or_path"]})
    )
    message = refused("export", "--adapter", prompts, *to, "dense")
    assert "got PROMPT_TUNING, which cannot be merged into a model" in message

    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100))
    message = refused("export", "--adapter", finished_run, *to, "dense")
    assert "is too full for model: " in message
    assert not output.parent.exists()


def test_inputs_are_protected(
    refused: Refused, paths: Paths, finished_run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    before = listing(tmp_path / "run")
    for output in (tmp_path / "run", tmp_path / "run" / "adapter" / "out"):
        message = refused("export", "--adapter", tmp_path / "run", "--to", "dense", "--output", output, "--overwrite")
        assert "--overwrite" in message
    assert listing(tmp_path / "run") == before


def test_bitsandbytes_rejects_codes_that_it_does_not_have(
    refused: Refused,
    paths: Paths,
    four_bit_model: pathlib.Path,
    tmp_path: pathlib.Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    here(
        "finetune", "--model", four_bit_model, "--data", paths["data"], "--output", run, "--max-steps", "1",
        "--seq-len", "32", "--batch-size", "1", "--eval-size", "2", "--rank", "2",
    )  # fmt: skip
    monkeypatch.setattr("qlora_app.models.loading.Loader.while_loading", never)
    capfd.readouterr()
    message = refused("export", "--adapter", run, "--to", "bitsandbytes", "--output", tmp_path / "out")
    assert "the adapter was trained on weights in int4, which bitsandbytes does not have" in message
    assert "use --to dense" in message
    monkeypatch.undo()
    here(*EXPORT, "--adapter", run, "--to", "dense", "--output", tmp_path / "out")


@pytest.fixture
def four_bit_model(tmp_path: pathlib.Path) -> pathlib.Path:
    """A GGUF file whose matrices are Q4_0."""
    from gguf_files import write
    from tiny_models import make

    path = tmp_path / "q4_0.gguf"
    write(make("llama"), path, "llama", kinds=["Q4_0"])
    return path
