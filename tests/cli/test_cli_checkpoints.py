"""The command on checkpoints in 4-bit formats of other libraries."""

from __future__ import annotations

import io
import json
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig

import packed_models
import qlora_ext
import tiny_models
from commands import command
from gguf_files import WIDE, WITH_BYTES, write, write_gpt_oss
from packed_models import SIZES
from qlora_ext.nn import layers_of

BYTES = {**SIZES, **WITH_BYTES}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8}
CASES = [
    ("llama", "nvfp4-pack-quantized"),
    ("llama", "awq"),
    ("llama", "fp8"),
    ("gpt_oss", "mxfp4"),
    ("llama", "gguf"),
    ("gpt_oss", "gguf"),
]


def say_hello() -> None:
    sys.stdin = io.StringIO("hello\n")


def done(*arguments: object, before: Callable[[], object] | None = None) -> str:
    run = command(*arguments, before=before)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture
def model(
    family: str, kind: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[pathlib.Path, dict[str, Any]]:
    """The path of a model with a tokenizer that reads any text, and the arguments with which transformers loads it."""
    monkeypatch.setitem(packed_models.CONFIGS, "llama", lambda: LlamaConfig(**BYTES))
    monkeypatch.setitem(packed_models.CONFIGS, "gpt_oss", lambda: GptOssConfig(**BYTES, **EXPERTS))
    if kind == "gguf":
        path = tmp_path / "model.gguf"
        if family == "gpt_oss":
            write_gpt_oss(packed_models.save(tmp_path, family, "mxfp4"), path)
        else:
            torch.manual_seed(0)
            config = LlamaConfig(**{**WIDE, **WITH_BYTES, "tie_word_embeddings": False})
            write(AutoModelForCausalLM.from_config(config, dtype=torch.float32), path, "llama", kinds=["Q4_1"])
        return path, {"pretrained_model_name_or_path": tmp_path, "gguf_file": path.name}
    checkpoint = packed_models.save(tmp_path, family, kind)
    tiny_models.save_tiny_llama(tmp_path / "llama", 0)
    for file in (tmp_path / "llama").glob("tokenizer*"):
        shutil.copy(file, checkpoint.path)
    return checkpoint.path, {"pretrained_model_name_or_path": checkpoint.path}


def losses(run: pathlib.Path) -> list[float]:
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [step["loss"] for step in steps if "loss" in step]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_the_commands(
    family: str, kind: str, model: tuple[pathlib.Path, dict[str, Any]], tmp_path: pathlib.Path
) -> None:
    path, options = model
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    base, data = ("--model", path), ("--data", text)
    run, adapter = tmp_path / "run", ("--adapter", tmp_path / "run" / "adapter")
    train = ("finetune", *base, *data, "--max-steps", 3, "--seq-len", 64, "--lr", 0.01, "--dtype", "bfloat16")
    printed = done(*train, "--output", run)
    # one layer of gpt-oss' GGUF file is in Q8_0
    bits = {("llama", "fp8"): "8", ("gpt_oss", "gguf"): "4 and 8"}.get((family, kind), "4")
    assert f"MB in {bits} bits" in printed
    assert losses(run)[-1] < losses(run)[0]
    for source in ("ram", "disk"):
        streamed = tmp_path / source
        printed = done(*train, "--output", streamed, "--stream", source)
        assert losses(streamed) == losses(run)
        assert same_files(streamed, run)
        assert ("converting" in printed) == (source == "disk")
        assert "quantizing" not in printed

    assert "in 4 bits" in done("check", *base, *data)
    done("generate", *adapter, "--prompt", "The", "--max-new-tokens", 2)
    done("chat", *adapter, "--max-new-tokens", 2, before=say_hello)

    planned = json.loads(done("plan", *base, "--json"))["bytes"]
    ours = {"quantization_config": qlora_ext.QLoRAConfig(), "dtype": torch.float32, "device_map": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(**options, **ours)
    forms = {name: layer.form for name, layer in layers_of(loaded)}
    weights = [layer.packed_weight(name) for _, layer in layers_of(loaded) for name in layer.packed_shapes]
    assert planned["base weights"] == sum(w4.packed.nbytes for w4 in weights)
    assert planned["scales"] == sum(w4.nbytes - w4.packed.nbytes for w4 in weights)

    done("merge", *adapter, "--output", tmp_path / "merged", "--dtype", "float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    expected = PeftModel.from_pretrained(loaded, run / "adapter").merge_and_unload()
    assert tiny_models.same_state(merged, expected)
    printed = done("merge", *adapter, "--output", tmp_path / "merged4", "--4bit")
    # gpt-oss' experts have no adapter by default
    is_packed = family == "llama" or kind == "gguf"
    assert ("the codes retain" if is_packed else "the adapter is on dense layers only") in printed
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged4", **ours)
    assert {name: layer.form for name, layer in layers_of(again)} == forms


def same_files(a: pathlib.Path, b: pathlib.Path) -> bool:
    found, expected = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (a, b))
    return found.keys() == expected.keys() and all(torch.equal(t, expected[name]) for name, t in found.items())


@pytest.mark.parametrize(("family", "kind"), [("llama", "fp8"), ("llama", "gguf")])
def test_layers_are_quantized_anew(
    family: str, kind: str, model: tuple[pathlib.Path, dict[str, Any]], tmp_path: pathlib.Path
) -> None:
    """In memory and streamed from disk, and the adapter finds its base again."""
    path, options = model
    text, base, quantize = tmp_path / "text.txt", ("--model", path), ("--quantize", "q4_0")
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    train = ("finetune", *base, *quantize, "--data", text, "--max-steps", 2, "--seq-len", 64, "--dtype", "bfloat16")
    assert "MB in 4" in done(*train, "--output", tmp_path / "run")
    done(*train, "--output", tmp_path / "streamed", "--stream", "disk")
    assert losses(tmp_path / "streamed") == losses(tmp_path / "run")
    assert same_files(tmp_path / "streamed", tmp_path / "run")
    done("generate", "--adapter", tmp_path / "streamed", "--prompt", "The", "--max-new-tokens", 2)
    planned = json.loads(done("plan", *base, "--quantize", "nf4", "--json"))["bytes"]
    ours = {"quantization_config": qlora_ext.QLoRAConfig(requantize=True), "device_map": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(**options, **ours)
    weights = [layer.packed_weight(name) for _, layer in layers_of(loaded) for name in layer.packed_shapes]
    assert planned["base weights"] == sum(w4.packed.nbytes for w4 in weights)
    bitsandbytes = ("--to", "bitsandbytes", "--output", tmp_path / "bnb")
    run = command("export", "--adapter", tmp_path / "run", *bitsandbytes)
    assert (run.returncode, "trained on weights in q4_0" in run.stderr) == (2, True)
    ours_again = ("finetune", "--model", tmp_path / "streamed-base", *quantize, "--data", text)
    run = command(*ours_again, "--output", tmp_path / "again")
    assert (run.returncode, "--quantize q4_0: " in run.stderr) == (2, True)


@pytest.mark.parametrize(("family", "kind"), [("llama", "nvfp4-pack-quantized"), ("gpt_oss", "mxfp4")])
def test_a_checkpoint_is_copied(
    family: str, kind: str, model: tuple[pathlib.Path, dict[str, Any]], tmp_path: pathlib.Path
) -> None:
    path, _ = model
    printed = done("quantize", "--model", path, "--output", tmp_path / "copy")
    assert "is 4-bit already; its 4-bit weights are copied as they are" in printed
    copied = load_file(tmp_path / "copy" / "model.safetensors")
    assert copied.keys() == load_file(path / "model.safetensors").keys()
