"""``qlora-ext export --to compressed-tensors:...``: the library decodes what we wrote, and the update is retained."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

for library in ("transformers", "peft", "gguf", "compressed_tensors"):
    pytest.importorskip(library, reason=f"{library} is not installed")

from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qlora_ext
from commands import Paths, here
from gguf_files import write
from qlora_ext.nn import layers_of
from tiny_models import make

Refused = Callable[..., str]
EXPORT = ("export", "--check", "none")
KINDS = ("int4", "nvfp4", "mxfp4")
IDS = torch.arange(40, 72).view(2, 16)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits.float()
    return found


def ours(directory: pathlib.Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=qlora_ext.QLoRAConfig())


def adapt(directory: pathlib.Path, base: Any, name: pathlib.Path, targets: list[str], size: float) -> None:
    torch.manual_seed(4)
    model = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, init_lora_weights=False)
    )
    for key, parameter in model.named_parameters():
        if ".lora_" in key:
            parameter.data.mul_(size)
    model.peft_config["default"].base_model_name_or_path = str(name)
    model.save_pretrained(directory)


@pytest.mark.parametrize("kind", KINDS)
def test_compressed_tensors_decodes_the_same_model(
    finished_run: pathlib.Path, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    output = tmp_path / kind
    here(*EXPORT, "--adapter", finished_run, "--to", f"compressed-tensors:{kind}", "--output", output)
    printed = re.search(r"the codes retain ([\d.]+)% of the adapter's update", capfd.readouterr().out)
    assert printed
    assert 85 < float(printed[1]) < 115
    theirs = AutoModelForCausalLM.from_pretrained(output, dtype=torch.bfloat16)
    assert type(theirs.hf_quantizer).__name__ == "CompressedTensorsHfQuantizer"
    model = ours(output)
    assert len(list(layers_of(model))) == 14
    expected = logits(theirs)
    assert (logits(model) - expected).norm() < 0.02 * expected.norm()
    decoded = ours(output).dequantize()
    assert (logits(decoded) - expected).norm() < 0.02 * expected.norm()
    here(*EXPORT, "--adapter", finished_run, "--to", "dense", "--output", tmp_path / "dense")
    dense = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    assert (expected - dense).norm() < 0.3 * dense.norm()


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
    refused: Refused, paths: Paths, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    here(*EXPORT, "--model", paths["model"], "--to", f"compressed-tensors:{kind}", "--output", base)
    adapt(tmp_path / "adapter", ours(base), base, ["q_proj"], 0.15)
    capfd.readouterr()
    here(*EXPORT, "--adapter", tmp_path / "adapter", "--to", f"compressed-tensors:{kind}", "--output", out)
    printed = re.search(r"the codes retain ([\d.]+)% of the adapter's update", capfd.readouterr().out)
    assert printed
    assert 80 < float(printed[1]) < 120
    before, after = (load_file(d / "model.safetensors") for d in (base, out))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight_packed" for i in range(2)}
    configs = [json.loads((d / "config.json").read_text())["quantization_config"] for d in (base, out)]
    assert configs[0] == configs[1]
    other = "nvfp4" if kind != "nvfp4" else "int4"
    message = refused("export", "--model", base, "--to", f"compressed-tensors:{other}", "--output", tmp_path / "no")
    assert "pack-quantized already, and rounding it to another 4-bit format would cost accuracy" in message


def test_a_gguf_file_in_the_same_form_keeps_its_codes(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(make("llama"), tmp_path / "base.gguf", "llama", kinds=["MXFP4"])
    here(*EXPORT, "--model", tmp_path / "base.gguf", "--to", "compressed-tensors:mxfp4", "--output", tmp_path / "out")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="base.gguf", dtype=torch.float32)
    exported = dict(layers_of(ours(tmp_path / "out")))
    assert len(exported) == 14
    for name, layer in exported.items():
        assert torch.equal(layer.weight4bit.dequantize(torch.float32), read.get_submodule(name).weight), name

    adapt(tmp_path / "adapter", read, tmp_path / "base.gguf", ["down_proj"], 0.15)
    capfd.readouterr()
    to = ["--adapter", tmp_path / "adapter", "--model", tmp_path / "base.gguf", "--to", "compressed-tensors:mxfp4"]
    here(*EXPORT, *to, "--output", tmp_path / "merged")
    printed = re.search(r"the codes retain ([\d.]+)% of the adapter's update", capfd.readouterr().out)
    assert printed
    assert 80 < float(printed[1]) < 120
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("out", "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.mlp.down_proj.weight_packed" for i in range(2)}


def test_layers_that_do_not_fit_stay_dense(refused: Refused, paths: Paths, tmp_path: pathlib.Path) -> None:
    from transformers import LlamaConfig

    sizes = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 257,
    }
    for name, intermediate in {"some": 64, "none": 40}.items():
        config = LlamaConfig(**{**sizes, "intermediate_size": intermediate})
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        for file in paths["model"].glob("tokenizer*"):
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    here(*EXPORT, "--model", tmp_path / "some", "--to", "compressed-tensors:int4", "--output", tmp_path / "out")
    assert [name for name, _ in layers_of(ours(tmp_path / "out"))] == ["model.layers.0.mlp.down_proj"]
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert len(ignored) == 7
    to = ["--to", "compressed-tensors:int4", "--output", tmp_path / "no"]
    assert "has no layer with rows of a multiple of 32 weights; use --to dense" in refused(
        "export", "--model", tmp_path / "none", *to
    )
