"""``qlora-ext export --to compressed-tensors:...``: which codes are retained, and which layers stay dense."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch

pytest.importorskip("compressed_tensors", reason="compressed_tensors is not installed")

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

import qlora_ext
from commands import Paths, here
from exports import Exported, Refused, adapt, logits, ours, read, retained
from gguf_files import write
from qlora_ext.nn import layers_of
from tensors import error
from tiny_models import make

EXPORT = ("export", "--check", "none")
KINDS = ("int4", "nvfp4", "mxfp4")


@pytest.mark.parametrize("kind", KINDS)
def test_compressed_tensors_decodes_the_same_model(exported: Exported, kind: str) -> None:
    found = exported(f"compressed-tensors:{kind}")
    assert 85 < retained(found.printed) < 115
    theirs = read(found.path, torch.bfloat16)
    assert type(theirs.hf_quantizer).__name__ == "CompressedTensorsHfQuantizer"
    expected = logits(theirs)
    model = ours(found.path, torch.bfloat16)
    assert len(list(layers_of(model))) == 14
    assert error(logits(model), expected) < 0.02
    assert error(logits(model.dequantize()), expected) < 0.02


def test_joined_layers_share_the_factor_of_nvfp4(paths: Paths, tmp_path: pathlib.Path) -> None:
    here(*EXPORT, "--model", paths["model"], "--to", "compressed-tensors:nvfp4", "--output", tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    dense = AutoModelForCausalLM.from_pretrained(paths["model"])
    model = ours(tmp_path / "out")
    for i in range(2):
        layer = f"model.layers.{i}."
        for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            factors = [state[f"{layer}{name}.weight_global_scale"] for name in names]
            assert all(torch.equal(factor, factors[0]) for factor in factors)
            w = torch.cat([dense.get_submodule(f"{layer}{name}").weight.float() for name in names])
            expected = qlora_ext.quantize(w, "nvfp4").dequantize()
            found = [model.get_submodule(f"{layer}{name}").weight4bit.dequantize(torch.float32) for name in names]
            assert torch.equal(torch.cat(found), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_in_the_same_format_keeps_its_codes(
    refused: Refused, paths: Paths, tmp_path: pathlib.Path, kind: str
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    here(*EXPORT, "--model", paths["model"], "--to", f"compressed-tensors:{kind}", "--output", base)
    adapt(tmp_path / "adapter", base, ours(base), 0.02, target_modules=["q_proj"])
    assert (
        80
        < retained(
            here(*EXPORT, "--adapter", tmp_path / "adapter", "--to", f"compressed-tensors:{kind}", "--output", out)
        )
        < 120
    )
    before, after = (load_file(d / "model.safetensors") for d in (base, out))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight_packed" for i in range(2)}
    configs = [json.loads((d / "config.json").read_text())["quantization_config"] for d in (base, out)]
    assert configs[0] == configs[1]
    other = "nvfp4" if kind != "nvfp4" else "int4"
    message = refused("export", "--model", base, "--to", f"compressed-tensors:{other}", "--output", tmp_path / "no")
    assert "pack-quantized already, and rounding it to another 4-bit format would cost accuracy" in message


def test_a_gguf_file_in_the_same_form_keeps_its_codes(tmp_path: pathlib.Path) -> None:
    base, to = tmp_path / "base.gguf", ["--to", "compressed-tensors:mxfp4", "--output"]
    write(make("llama"), base, "llama", kinds=["MXFP4"])
    here(*EXPORT, "--model", base, *to, tmp_path / "out")
    dense = read(base)
    exported = dict(layers_of(ours(tmp_path / "out")))
    assert len(exported) == 14
    for name, layer in exported.items():
        assert torch.equal(layer.weight4bit.dequantize(torch.float32), dense.get_submodule(name).weight), name

    adapt(tmp_path / "adapter", base, dense, 0.02, target_modules=["down_proj"])
    assert (
        80 < retained(here(*EXPORT, "--adapter", tmp_path / "adapter", "--model", base, *to, tmp_path / "merged")) < 120
    )
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("out", "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.mlp.down_proj.weight_packed" for i in range(2)}


def test_layers_that_do_not_fit_stay_dense(refused: Refused, paths: Paths, tmp_path: pathlib.Path) -> None:
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 257}
    for name, intermediate in {"some": 64, "none": 40}.items():
        config = LlamaConfig(**sizes, intermediate_size=intermediate)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        for file in paths["model"].glob("tokenizer*"):
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    to = ["--to", "compressed-tensors:int4", "--output"]
    here(*EXPORT, "--model", tmp_path / "some", *to, tmp_path / "out")
    assert [name for name, _ in layers_of(ours(tmp_path / "out"))] == ["model.layers.0.mlp.down_proj"]
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert len(ignored) == 7
    told = refused("export", "--model", tmp_path / "none", *to, tmp_path / "no")
    assert "has no layer with rows of a multiple of 32 weights; use --to dense" in told
