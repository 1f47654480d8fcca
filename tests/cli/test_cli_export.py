"""``qlora-ext export`` and ``qlora_app.export``: what holds for every target, and what is rejected for all of them."""

from __future__ import annotations

import io
import json
import pathlib
import re
import shutil
import types
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_app
from commands import Paths, here, listing
from exports import TARGETS, Exported, Refused, logits, ours, read, with_adapter_file, write_base
from gguf_files import llama_file as llama_file
from qlora_app.exporting import targets
from qlora_app.main import main
from qlora_ext.untrusted import printable
from tensors import error

EXPORT = ("export", "--check", "none")
MODELS = [to for to in TARGETS if not to.startswith("ollama") and "adapter" not in to]
LOSSES = re.compile(
    r"loss on ([\d,]+) tokens of (.*): ([\d.]+) trained, ([\d.]+) exported \(([+-][\d.]+)\), standard error ([\d.]+)"
)


def tensors(directory: pathlib.Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(directory / "model.safetensors")
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def never(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("weights were read")


def test_every_target_has_a_row() -> None:
    """The targets for Ollama have the files of the others."""
    assert {to for to in targets.TARGETS if not to.startswith("ollama:")} <= {*TARGETS} <= {*targets.TARGETS}


@pytest.mark.parametrize("to", TARGETS)
def test_its_reader_computes_the_trained_model(exported: Exported, tmp_path: pathlib.Path, to: str) -> None:
    found, target = exported(to), TARGETS[to]
    base = ours(found.base) if target.base == "run" else read(found.base)
    before = logits(base)
    trained = logits(PeftModel.from_pretrained(base, found.adapter))
    assert error(before, trained) > 2 * target.logits
    if "adapter" in to:
        model = read(with_adapter_file(found.base, found.file, tmp_path / "merged.gguf"))
    elif "compressed" in to:  # the library decodes to bfloat16
        model = read(found.path, torch.bfloat16)
    else:
        model = read(found.path if target.base == "run" else found.file)
    assert error(logits(model), trained) < target.logits


@pytest.mark.parametrize("to", TARGETS)
def test_the_report(exported: Exported, to: str) -> None:
    found, target = exported(to), TARGETS[to]
    losses = LOSSES.search(found.printed)
    assert losses, found.printed
    trained, other, difference, deviation = map(float, losses.groups()[2:])
    assert int(losses[1].replace(",", "")) > 1000
    held_out = r".* \(\d+ of them held out by the run\) and a text that the model wrote"
    assert re.fullmatch(held_out if target.base == "run" else r".*/text\.txt", losses[2])
    assert abs(other - trained - difference) < 1.6e-4
    assert abs(difference) <= (0.05 if target.is_4bit else 2e-3)
    assert deviation < 0.05
    what = "update" if "adapter" in to else "weights"
    weights = re.search(rf"relative error of the {what}: ([\d.e+-]+) in all (\d+) layers", found.printed)
    assert weights, found.printed
    assert float(weights[1]) <= target.weights
    assert int(weights[2]) == (14 if what == "update" else 16)
    if what == "weights":
        assert float(weights[1]) > 0.1 * target.weights
        assert re.search(r"model\.layers\.\d\.\w+\.\w+_proj", found.printed)
    assert f"{found.path} needs about " in found.printed
    assert f"MB in {to}{':same' if to in ('gguf', 'ollama') else ''}\n" in found.printed


def greedy(output: pathlib.Path) -> str:
    """What the dense model with the same weights answers."""
    file = {"gguf_file": output.name} if output.is_file() else {}
    directory = output.parent if file else output
    tokenizer = AutoTokenizer.from_pretrained(directory, **file)
    model = read(output) if file else ours(output).dequantize()
    ids = tokenizer("count 3", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = model.generate(ids, do_sample=False, max_new_tokens=6, pad_token_id=0)
    text: str = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    return text.strip()


@pytest.mark.parametrize("to", MODELS)
def test_the_commands_open_it(
    exported: Exported, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, to: str,
) -> None:  # fmt: skip
    output, base = exported(to).path, exported("dense" if TARGETS[to].base == "run" else "gguf:f16").path
    answer = here(
        "generate", "--model", output, "--raw", "--max-new-tokens", "6", "--prompt", "count 3", "--dtype", "float32"
    )
    if TARGETS[to].is_4bit:  # generate quantizes the others
        assert answer == f"{printable(greedy(output), lines=True)}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("count 3\n"))
    assert here("chat", "--model", output, "--max-new-tokens", "4").endswith("\n")
    (tmp_path / "text.txt").write_text("some text that is long enough for a check. " * 30)
    check = ["check", "--model", output, "--data", tmp_path / "text.txt", "--tokens", "512", "--max-increase", "2"]
    printed = here(*check, "--base", base)
    assert re.search(r"perplexity on [\d,]+ tokens of .*: [\d.]+ in 4 bits, [\d.]+ dense", printed), printed
    assert "the loss rises by" in printed
    assert "damaged" not in printed


def test_an_adapter_file_is_not_a_model(refused: Refused, exported: Exported) -> None:
    path = exported("gguf-adapter").path
    for command in (["generate", "--prompt", "1"], ["check"]):
        assert "holds an adapter, not a model" in refused(*command, "--model", path)
    message = refused("generate", "--adapter", path, "--prompt", "1")
    assert "expected a directory with an adapter of PEFT, got a file" in message


def test_without_an_adapter(paths: Paths, llama_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The dense target copies or decodes a model, and bitsandbytes' is what ``quantize`` writes."""
    here(*EXPORT, "--model", paths["model"], "--to", "dense", "--output", tmp_path / "copy")
    assert same(tensors(tmp_path / "copy"), tensors(paths["model"]))
    here("quantize", "--model", paths["model"], "--output", tmp_path / "4bit")
    here(*EXPORT, "--model", tmp_path / "4bit", "--to", "dense", "--output", tmp_path / "decoded")
    decoded = AutoModelForCausalLM.from_pretrained(tmp_path / "decoded")
    assert getattr(decoded.config, "quantization_config", None) is None
    assert same(decoded.state_dict(), AutoModelForCausalLM.from_pretrained(tmp_path / "4bit").dequantize().state_dict())
    here(*EXPORT, "--model", llama_file, "--to", "dense", "--dtype", "float32", "--output", tmp_path / "from_gguf")
    assert same(read(tmp_path / "from_gguf").state_dict(), read(llama_file).state_dict())
    here("quantize", "--model", paths["model"], "--output", tmp_path / "one", "--format", "bitsandbytes")
    here(*EXPORT, "--model", paths["model"], "--to", "bitsandbytes", "--output", tmp_path / "other")
    assert same(tensors(tmp_path / "one"), tensors(tmp_path / "other"))
    assert listing(tmp_path / "one").keys() == listing(tmp_path / "other").keys()


def test_merge_and_python_do_the_same(paths: Paths, finished_run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    here("merge", "--adapter", finished_run, "--output", tmp_path / "merged")
    here(*EXPORT, "--adapter", finished_run, "--to", "dense", "--output", tmp_path / "one")
    other = tmp_path / "other"
    assert qlora_app.export(adapter=finished_run, to="dense", output=other) == other
    one, merged = listing(tmp_path / "one"), listing(tmp_path / "merged")
    assert listing(other) == one
    assert one.keys() == merged.keys()
    assert {name for name in one if one[name] != merged[name]} <= {"qlora_output.json"}
    for options, kind, message in (
        ({"output": other}, ValueError, "^output .* exists and is not empty; name another directory, or add overw"),
        ({"to": "onnx"}, ValueError, "^to onnx: expected one of dense, "),
        ({"adaptor": "a"}, TypeError, r"^export\(\) got an unexpected keyword argument 'adaptor'"),
        ({"overwrite": "no"}, TypeError, "^export: expected overwrite to be "),
    ):
        with pytest.raises(kind, match=message):
            qlora_app.export(**{"adapter": finished_run, "to": "dense", "output": tmp_path / "no", **options})
    qlora_app.export(model=paths["model"], to="dense", output=other, overwrite=True)
    assert same(tensors(other), tensors(paths["model"]))


def test_nothing_is_written_before_the_checks(
    refused: Refused, paths: Paths, finished_run: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_app.models.loading.Loader.while_loading", never)
    monkeypatch.setattr("qlora_app.exporting.model_directories.load_dense", never)
    prompts = pathlib.Path(shutil.copytree(finished_run / "adapter", tmp_path / "prompts"))
    (prompts / "qlora_run.json").unlink()
    base = json.loads((prompts / "adapter_config.json").read_text())["base_model_name_or_path"]
    config = {"peft_type": "PROMPT_TUNING", "base_model_name_or_path": base}
    (prompts / "adapter_config.json").write_text(json.dumps(config))
    output = tmp_path / "out" / "model"
    for arguments, message in (
        (["--to", "dense"], "expected an adapter (--adapter) or a model (--model)"),
        (["--to", "bitsandbites", "--model", paths["model"]], "did you mean bitsandbytes?"),
        (["--to", "dense", "--adapter", prompts], "got PROMPT_TUNING, which cannot be merged into a model"),
    ):
        assert message in refused("export", *arguments, "--output", output)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100))
    message = refused("export", "--adapter", finished_run, "--to", "dense", "--output", output)
    assert "is too full for model: " in message
    assert not output.parent.exists()


def test_inputs_are_protected(refused: Refused, finished_run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run = pathlib.Path(shutil.copytree(finished_run, tmp_path / "run"))
    before = listing(run)
    for output in (run, run / "adapter" / "out"):
        message = refused("export", "--adapter", run, "--to", "dense", "--output", output, "--overwrite")
        assert "--overwrite" in message
    assert listing(run) == before


def test_bitsandbytes_rejects_codes_that_it_does_not_have(
    refused: Refused, paths: Paths, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    base, run = write_base(tmp_path / "q4_0.gguf", "Q4_0"), tmp_path / "run"
    options = ["--max-steps", "1", "--seq-len", "32", "--batch-size", "1", "--eval-size", "2", "--rank", "2"]
    here("finetune", "--model", base, "--data", paths["data"], "--output", run, *options)
    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("qlora_app.models.loading.Loader.while_loading", never)
        message = refused("export", "--adapter", run, "--to", "bitsandbytes", "--output", tmp_path / "out")
    assert "the adapter was trained on weights in int4, which bitsandbytes does not have" in message
    assert "use --to dense" in message
    assert main([*EXPORT, "--adapter", str(run), "--to", "dense", "--output", str(tmp_path / "out")]) == 0
