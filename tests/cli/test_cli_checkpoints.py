"""The command on checkpoints in 4-bit formats of other libraries."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="PEFT is not installed")

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig

import packed_models
import qlora_ext
import tiny_models
from commands import command
from packed_models import SIZES
from qlora_ext.nn import layers_of

BYTES = {**SIZES, "vocab_size": 257, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": 256}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8}


@pytest.mark.parametrize(("family", "kind"), [("llama", "nvfp4-pack-quantized"), ("gpt_oss", "mxfp4")])
def test_the_commands(family: str, kind: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packed_models.CONFIGS, "llama", lambda: LlamaConfig(**BYTES))
    monkeypatch.setitem(packed_models.CONFIGS, "gpt_oss", lambda: GptOssConfig(**BYTES, **EXPERTS))
    checkpoint = packed_models.save(tmp_path, family, kind)
    tiny_models.save_tiny_llama(tmp_path / "llama", 0)
    for file in (tmp_path / "llama").glob("tokenizer*"):
        shutil.copy(file, checkpoint.path)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    model = ("--model", checkpoint.path)
    run = command("finetune", *model, "--data", text, "--output", tmp_path / "run", "--max-steps", 2, "--seq-len", 64)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    prompt = ("--prompt", "The", "--max-new-tokens", 2)
    for arguments in (("generate", "--adapter", tmp_path / "run" / "adapter", *prompt), ("plan", *model)):
        run = command(*arguments)
        assert run.returncode == 0, run.stderr
    planned = command("plan", *model, "--json")
    assert planned.returncode == 0, planned.stderr
    planned_bytes = json.loads(planned.stdout)["bytes"]
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint.path, quantization_config=qlora_ext.QLoRAConfig())
    weights = [layer.packed_weight(name) for _, layer in layers_of(loaded) for name in layer.packed_shapes]
    assert planned_bytes["base weights"] == sum(w4.packed.nbytes for w4 in weights)
    assert planned_bytes["scales"] == sum(w4.nbytes - w4.packed.nbytes for w4 in weights)
    run = command("quantize", *model, "--output", tmp_path / "copy")
    assert run.returncode == 0, run.stderr
    assert "is 4-bit already; its 4-bit weights are copied as they are" in run.stdout
    copied = load_file(tmp_path / "copy" / "model.safetensors")
    assert copied.keys() == checkpoint.tensors.keys()
