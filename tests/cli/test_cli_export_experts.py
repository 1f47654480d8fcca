"""``qlora-ext export`` of models whose experts are stacked weights, with and without adapters on the experts."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import pytest
import torch

pytest.importorskip("compressed_tensors", reason="compressed_tensors is not installed")

import gguf
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import packed_models
from commands import Paths, here
from exports import Refused, adapt, logits, ours, output_of, read, retained, share
from gguf_files import WIDE, WITH_BYTES, write
from qlora_ext.nn import Experts4bit, layers_of
from tensors import error

EXPORT = ("export", "--check", "none")
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS = ("int4", "nvfp4", "mxfp4")
FAMILIES = {
    "qwen3_moe": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2"),
    "gpt_oss": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
}


def save(directory: pathlib.Path, family: str, paths: Paths) -> pathlib.Path:
    torch.manual_seed(0)
    config = packed_models.CONFIGS[family]()
    config.vocab_size = 257
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, p in model.named_parameters():  # large enough for the experts to matter, and biases that are not zero
        if ".experts." in name:
            torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(directory)
    for file in paths["model"].glob("tokenizer*"):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def adapted(directory: pathlib.Path, base: pathlib.Path, size: float = 1.0, **options: Any) -> pathlib.Path:
    """Saves an adapter on q and on the experts."""
    adapt(directory, base, ours(base), size, **{"target_modules": ["q_proj"], "target_parameters": STACKS, **options})
    return directory


def decoded_by_the_library(directory: pathlib.Path, name: str) -> torch.Tensor:
    """The weight of one linear layer, as compressed-tensors decodes it."""
    config = QuantizationConfig(**json.loads((directory / "config.json").read_text())["quantization_config"])
    scheme = config.config_groups["group_0"]
    state = load_file(directory / "model.safetensors")
    prefix = f"{name}."
    tensors = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
    weight: torch.Tensor = BaseCompressor.get_value_from_registry(config.format).decompress(tensors, scheme)["weight"]
    return weight.float()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_tensors_stores_experts_one_by_one(
    paths: Paths, tmp_path: pathlib.Path, family: str, kind: str
) -> None:
    base, out = save(tmp_path / "base", family, paths), tmp_path / "out"
    adapter = adapted(tmp_path / "adapter", base)
    assert (
        85 < retained(here(*EXPORT, "--adapter", adapter, "--to", f"compressed-tensors:{kind}", "--output", out)) < 115
    )
    model = ours(out)
    assert sum(isinstance(layer, Experts4bit) for _, layer in layers_of(model)) == 2
    here(*EXPORT, "--adapter", adapter, "--to", "dense", "--output", tmp_path / "dense")
    dense, before = (AutoModelForCausalLM.from_pretrained(d) for d in (tmp_path / "dense", base))
    for name, layer in layers_of(model):  # logits would compare which experts the routers choose
        for parameter in layer.packed_shapes:
            w4 = layer.packed_weight(parameter).dequantize(torch.float32)
            found = layer.dequantize(parameter, torch.float32) if isinstance(layer, Experts4bit) else w4
            expected, old = (getattr(m.get_submodule(name), parameter).float() for m in (dense, before))
            assert error(found, expected) < 0.2, name
            if "experts" in name or "q_proj" in name:
                assert error(found, expected) < 0.6 * error(old, expected), name

    experts, gate, up, down = FAMILIES[family]
    for i in range(2):
        layer = model.get_submodule(f"model.layers.{i}.mlp.experts")
        for e in range(4):
            parts = [decoded_by_the_library(out, f"model.layers.{i}.{experts}.{e}.{name}") for name in (gate, up, down)]
            stacks = [layer.packed_weight(name).matrix(e).dequantize(torch.float32) for name in layer.packed_shapes]
            if family == "gpt_oss":
                halves = [stacks[0][0::2], stacks[0][1::2]]
            else:
                halves = [*stacks[0].chunk(2)]
            for found, there in zip([*halves, stacks[1]], parts, strict=True):
                torch.testing.assert_close(there, found, rtol=0.01, atol=1e-6)  # the library decodes to 16 bits


@pytest.mark.parametrize("kind", ["int4", "mxfp4"])  # transformers drops the factors of NVFP4 experts
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])  # it has no conversion of single experts of gpt-oss
def test_transformers_reads_the_experts(paths: Paths, tmp_path: pathlib.Path, family: str, kind: str) -> None:
    base, out = save(tmp_path / "base", family, paths), tmp_path / "out"
    here(*EXPORT, "--model", base, "--to", f"compressed-tensors:{kind}", "--output", out)
    theirs = read(out, torch.bfloat16)
    assert type(theirs.hf_quantizer).__name__ == "CompressedTensorsHfQuantizer"
    assert error(logits(ours(out, torch.bfloat16)), logits(theirs)) < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_experts_in_the_same_format_keep_their_codes(paths: Paths, tmp_path: pathlib.Path, kind: str) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    to = ["--to", f"compressed-tensors:{kind}", "--output"]
    here(*EXPORT, "--model", save(tmp_path / "dense", "qwen3_moe", paths), *to, base)
    adapter = adapted(tmp_path / "adapter", base, 0.02, target_parameters=STACKS[1:])
    assert retained(here(*EXPORT, "--adapter", adapter, *to, out))
    before, after = (load_file(d / "model.safetensors") for d in (base, out))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"model.layers.{i}.{name}.weight_packed"
        for i in range(2)
        for name in ("self_attn.q_proj", *(f"mlp.experts.{e}.down_proj" for e in range(4)))
    }


def test_routers_stay_dense_for_servers(paths: Paths, tmp_path: pathlib.Path) -> None:
    """Servers make linear layers of routers, so that the configuration has to name them."""
    for family, router in (("qwen3_moe", "mlp.gate"), ("mixtral", "block_sparse_moe.gate"), ("gpt_oss", "mlp.router")):
        out = tmp_path / f"{family}-out"
        base = save(tmp_path / family, family, paths)
        here(*EXPORT, "--model", base, "--to", "compressed-tensors:int4", "--output", out)
        ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
        assert {"lm_head", *(f"model.layers.{i}.{router}" for i in range(2))} <= {*ignored}
        state = load_file(out / "model.safetensors")
        assert state[f"model.layers.0.{router}.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_and_bitsandbytes_hold_merged_experts(paths: Paths, tmp_path: pathlib.Path, family: str) -> None:
    """Both have the experts of PEFT's merged model, dense; bitsandbytes rounds the linear layers to 4 bits."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = save(tmp_path / "base", family, paths)
    adapter = adapted(tmp_path / "adapter", base)
    merged = PeftModel.from_pretrained(ours(base, torch.bfloat16), adapter).merge_and_unload().state_dict()
    for target in ("dense", "bitsandbytes"):
        here(*EXPORT, "--adapter", adapter, "--to", target, "--output", tmp_path / target)
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / target, dtype=torch.bfloat16)
        state = exported.state_dict()
        stacks = [name for name in state if re.search(r"experts\.(gate_up|down)_proj$", name)]
        assert len(stacks) == 4
        assert all(torch.equal(state[name], merged[name]) for name in stacks)
        q = exported.get_submodule("model.layers.0.self_attn.q_proj")
        assert type(q).__name__ == {"dense": "Linear", "bitsandbytes": "Linear4bit"}[target]


def test_bitsandbytes_without_an_adapter_keeps_dense_experts(paths: Paths, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = save(tmp_path / "base", "qwen3_moe", paths)
    here(*EXPORT, "--model", base, "--to", "bitsandbytes", "--output", tmp_path / "out")
    found, expected = (load_file(d / "model.safetensors") for d in (tmp_path / "out", base))
    experts = [name for name in expected if ".experts." in name]
    assert len(experts) == 24
    assert all(torch.equal(found[name], expected[name]) for name in experts)
    assert found["model.layers.0.self_attn.q_proj.weight"].dtype == torch.uint8
    here("quantize", "--model", base, "--output", tmp_path / "4bit")
    here(*EXPORT, "--model", tmp_path / "4bit", "--to", "bitsandbytes", "--output", tmp_path / "decoded")
    decoded = AutoModelForCausalLM.from_pretrained(tmp_path / "4bit").dequantize().state_dict()
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "decoded", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(state[name], decoded[name]) for name in decoded if ".experts." in name)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_gguf_adapter_has_a_matrix_for_each_expert(paths: Paths, tmp_path: pathlib.Path, family: str) -> None:
    """llama.cpp multiplies the tokens of expert e by A[e] and B[e] of each of its tensors."""
    base = save(tmp_path / "base", family, paths)
    adapter = adapted(tmp_path / "adapter", base, rank_pattern={"mlp.experts.down_proj": 2}, lora_alpha=6)
    here(*EXPORT, "--adapter", adapter, "--to", "gguf-adapter", "--output", tmp_path / "adapter.gguf")
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    alpha = reader.fields["adapter.lora.alpha"].contents()
    found = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    model = PeftModel.from_pretrained(ours(base), adapter)
    for i in range(2):
        for stack, tensors in {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.items():
            layer = next(
                m for name, m in model.named_modules()
                if f"layers.{i}.mlp.experts" in name and getattr(m, "parameter_name", None) == stack
            )  # fmt: skip
            delta = layer.layer4bit.as_quantized(layer.get_delta_weight("default"))
            parts = [delta]
            if stack == "gate_up_proj":
                parts = [delta[:, 0::2], delta[:, 1::2]] if family == "gpt_oss" else [*delta.chunk(2, 1)]
            for tensor, expected in zip(tensors, parts, strict=True):
                a, b = (found.pop(f"blk.{i}.ffn_{tensor}_exps.weight.lora_{side}") for side in "ab")
                assert a.ndim == b.ndim == 3
                torch.testing.assert_close(alpha / b.shape[2] * (b @ a), expected, rtol=1e-4, atol=1e-5)
    assert {*found} == {f"blk.{i}.attn_q.weight.lora_{side}" for i in range(2) for side in "ab"}


def mixed(path: pathlib.Path, down: str) -> pathlib.Path:
    """A GGUF file with 4-bit attention, and experts in two types, which stay dense if one of them has more bits."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **{**WIDE, **WITH_BYTES}, head_dim=64, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=256
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    kinds = {f"blk.{i}.ffn_{name}_exps.weight": kind for i in range(2) for name, kind in
             {"gate": "Q4_0", "up": "Q4_0", "down": down}.items()}  # fmt: skip
    write(model, path, "qwen3moe", kinds=["Q4_0"], of=kinds | {"token_embd.weight": "F16", "output.weight": "F16"})
    return path


# Those that a base with all experts in 4 bits, and one with dense experts, is exported to.
TARGETS = {
    "Q4_0": ("gguf-adapter", "gguf:q4_0"),
    "Q8_0": ("gguf-adapter", "gguf:q4_0", "gguf:f16", "dense", "compressed-tensors:int4"),
}


@pytest.mark.parametrize("down", TARGETS)
def test_experts_of_a_gguf_file(refused: Refused, tmp_path: pathlib.Path, down: str) -> None:
    """Every target has the trained model, as its report says."""
    base, text = mixed(tmp_path / "base.gguf", down), tmp_path / "text.txt"
    text.write_text("some text that is long enough for a check. " * 12)
    parameters = [*STACKS, "mlp.gate.weight"]
    adapt(tmp_path / "adapter", base, read(base), 0.3, target_modules=["q_proj"], target_parameters=parameters)
    export = ["export", "--adapter", tmp_path / "adapter", "--dtype", "float32", "--data", text, "--to"]
    for to in TARGETS[down]:
        assert abs(share(here(*export, to, "--output", output_of(to, tmp_path))) - 100) < (15 if "4" in to else 0.5), to
    told = refused(*export, "bitsandbytes", "--output", tmp_path / "no")
    assert "rounding them to NF4 would lose what was learnt" in told


def test_an_adapter_on_other_experts_is_rejected(refused: Refused, paths: Paths, tmp_path: pathlib.Path) -> None:
    base = save(tmp_path / "base", "qwen3_moe", paths)
    adapter = adapted(tmp_path / "adapter", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_experts": 5, "num_local_experts": 5}))
    message = refused("export", "--adapter", adapter, "--to", "gguf-adapter", "--output", tmp_path / "no.gguf")
    assert re.search(r"does not fit its base: model\.layers\.0\.mlp\.experts has A \[\d+, \d+\], expected", message)
