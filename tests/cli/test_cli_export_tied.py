"""``qlora-ext export`` of adapters on an output head that is tied to the embeddings, and of modules saved in full."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

for library in ("transformers", "peft", "gguf"):
    pytest.importorskip(library, reason=f"{library} is not installed")

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import qlora_ext
from commands import Paths, here
from qlora_app.models import load_dense, resolve
from qlora_ext.gguf.file import read_header

Refused = Callable[..., str]
IDS = torch.arange(40, 72).view(2, 16)
# Settings of adapters that change the head, the embeddings or both, and whether the merged model is still tied.
CHANGES: dict[str, tuple[dict[str, Any], bool]] = {
    "LoRA on the head": ({"target_modules": ["q_proj", "lm_head"]}, False),
    "LoRA on the embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    "a saved head": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    "saved embeddings": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
    "both saved, tied": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
    "neither": ({"target_modules": ["q_proj"]}, True),
    "a saved norm": ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, True),
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits.float()
    return found


def ours(directory: pathlib.Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=qlora_ext.QLoRAConfig(), dtype=torch.bfloat16
    )


def save_tied(directory: pathlib.Path, paths: Paths) -> pathlib.Path:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(paths["model"])
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    for file in paths["model"].glob("tokenizer*"):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def adapt(directory: pathlib.Path, base: pathlib.Path, options: dict[str, Any]) -> pathlib.Path:
    torch.manual_seed(4)
    model = get_peft_model(ours(base), LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **options))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.mul_(1.0 if "q_proj" in name else 0.3)
        elif ".modules_to_save." in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.02)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("target", ["dense", "bitsandbytes", "compressed-tensors:int4"])
def test_the_merged_model_computes_what_the_adapter_does(
    paths: Paths, tmp_path: pathlib.Path, change: str, target: str
) -> None:
    options, tied = CHANGES[change]
    base, out = save_tied(tmp_path / "base", paths), tmp_path / "out"
    adapter = adapt(tmp_path / "adapter", base, options)
    expected = logits(PeftModel.from_pretrained(ours(base), adapter))
    assert (logits(ours(base)) - expected).norm() > 0.02 * expected.norm()
    here("export", "--check", "none", "--adapter", adapter, "--to", target, "--output", out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] == tied
    model = ours(out) if target.startswith("compressed") else AutoModelForCausalLM.from_pretrained(out)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    error = (logits(model) - expected).norm() / expected.norm()
    assert error < (0.02 if target == "dense" else 0.2)


@pytest.mark.parametrize("change", ["LoRA on the head", "saved embeddings", "neither"])
@pytest.mark.parametrize("four_bit", [False, True])
def test_merge_unties_too(paths: Paths, tmp_path: pathlib.Path, change: str, four_bit: bool) -> None:
    options, tied = CHANGES[change]
    base, out = save_tied(tmp_path / "base", paths), tmp_path / "out"
    adapter = adapt(tmp_path / "adapter", base, options)
    expected = logits(PeftModel.from_pretrained(ours(base), adapter))
    here("merge", "--adapter", adapter, "--output", out, *(["--4bit"] if four_bit else []))
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] == tied
    error = (logits(AutoModelForCausalLM.from_pretrained(out)) - expected).norm() / expected.norm()
    assert error < (0.2 if four_bit else 0.02)


@pytest.mark.parametrize("change", ["LoRA on the head", "LoRA on the embeddings", "both saved, tied", "neither"])
def test_a_gguf_file_computes_what_the_adapter_does(paths: Paths, tmp_path: pathlib.Path, change: str) -> None:
    base, out = save_tied(tmp_path / "base", paths), tmp_path / "out.gguf"
    adapter = adapt(tmp_path / "adapter", base, CHANGES[change][0])
    expected = logits(PeftModel.from_pretrained(ours(base), adapter))
    here("export", "--check", "none", "--adapter", adapter, "--to", "gguf:f16", "--check", "none", "--output", out)
    names = {tensor.name for tensor in read_header(out).tensors}
    assert ("output.weight" in names) == (change != "neither")
    model = load_dense(resolve(str(out)), torch.float32, torch.device("cpu"))
    assert (logits(model) - expected).norm() < 0.02 * expected.norm()


def test_files_that_tie_both_name_a_target_that_does_not(
    refused: Refused, paths: Paths, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = save_tied(tmp_path / "base", paths)
    adapter = adapt(tmp_path / "adapter", base, CHANGES["LoRA on the head"][0])
    capfd.readouterr()
    message = refused("export", "--adapter", adapter, "--to", "gguf-adapter", "--output", tmp_path / "no.gguf")
    assert "is on lm_head, and the model ties its output head to its embeddings" in message
    assert "use --to dense, which unties them" in message
