"""Incomplete models and adapters are rejected: missing, misfit or damaged weights are named."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qlora_ext
from commands import Paths
from qlora_app.main import main
from qlora_ext.integrations.peft import IncompleteAdapterWarning
from tiny_models import make


def change_weights(directory: pathlib.Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = next(directory.glob("*.safetensors"))
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


def change_json(path: pathlib.Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.fixture
def model(paths: Paths, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(paths["model"], tmp_path / "model"))


@pytest.fixture
def adapter(finished_run: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(finished_run / "adapter", tmp_path / "adapter"))


LAYER = "model.layers.1."
UP, NORM, TABLE = f"{LAYER}mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"
Weights = dict[str, torch.Tensor]


def without(beginning: str) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        for name in [name for name in weights if name.startswith(beginning)]:
            del weights[name]
        weights.setdefault("nothing", torch.zeros(1)) if not weights else None

    return change


def rename(old: str, new: str) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        weights[new] = weights.pop(old)

    return change


def put(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        weights[name] = value(weights[name].clone()).contiguous()

    return change


def with_first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(weight: torch.Tensor) -> torch.Tensor:
        weight.view(-1)[0] = value
        return weight

    return change


# What is missing, and how many weights that are, of which those of layers become 4-bit.
MISSING = {TABLE: 1, "lm_head.weight": 1, NORM: 1, f"{LAYER}input_layernorm.weight": 1, f"{LAYER}mlp.up_proj": 1,
           LAYER: 7, "model.layers.": 14, "": 1}  # fmt: skip
# Changes of the weights, and what the sentence names.
UNFITTING: dict[str, tuple[Callable[[Weights], object], list[str]]] = {
    **{f"without {gone}": (without(gone), [gone, str(count)]) for gone, count in MISSING.items()},
    "another name": (rename(UP, f"{LAYER}mlp.upproj.weight"), [f"{LAYER}mlp.up_proj"]),
    "fewer rows": (put(UP, lambda w: w[:-1]), [UP]),
    "transposed": (put(UP, lambda w: w.T), [UP]),
    "a shorter norm": (put(NORM, lambda w: w[:-1]), [NORM]),
    "fewer tokens": (put(TABLE, lambda w: w[:-1]), [TABLE]),
    "NaN in the embeddings": (put(TABLE, with_first(float("nan"))), [TABLE]),
    "infinity in a norm": (put(NORM, with_first(float("inf"))), [NORM]),
    "NaN in a layer": (put(UP, with_first(float("nan"))), [f"{LAYER}mlp.up_proj"]),
    "a bias": (lambda w: w.update({f"{LAYER}mlp.up_proj.bias": torch.zeros(128)}), [f"{LAYER}mlp.up_proj.bias"]),
    "a third layer": (lambda w: w.update({UP.replace("1", "2"): torch.zeros(128, 64)}), ["layers.2"]),
}


@pytest.mark.parametrize("name", UNFITTING)
def test_unfitting_weights(refused, model: pathlib.Path, tmp_path: pathlib.Path, name: str) -> None:
    change, parts = UNFITTING[name]
    change_weights(model, change)
    message = refused("quantize", "--model", model, "--output", tmp_path / "out")
    assert str(model) in message
    for part in parts:
        assert part in message.replace(str(model), "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 1),
        ("num_hidden_layers", 3),
        ("num_hidden_layers", 10**9),
        ("vocab_size", 250),
        ("vocab_size", 10**9),
        ("hidden_size", 2**40),
        ("intermediate_size", 64),
        ("num_key_value_heads", 4),
        ("attention_bias", True),
        ("model_type", "no-such-model"),
        ("num_attention_heads", 0),
        ("attn_implementation", "somebody/kernel"),
    ],
)
def test_a_configuration_of_another_model(refused, model: pathlib.Path, tmp_path: pathlib.Path, key: str, value: Any):
    change_json(model / "config.json", lambda config: config.update({key: value}))
    assert str(model) in refused("quantize", "--model", model, "--output", tmp_path / "out")


def test_a_4bit_model_with_a_hole(refused, paths: Paths, tmp_path: pathlib.Path) -> None:
    saved = tmp_path / "saved"
    assert main(["quantize", "--model", str(paths["model"]), "--output", str(saved)]) == 0
    for gone, named in (("model.norm.weight", "model.norm.weight"), ("layers.1.mlp.up_proj", LAYER + "mlp.up_proj")):
        broken = pathlib.Path(shutil.copytree(saved, tmp_path / gone))
        change_weights(broken, lambda w, gone=gone: [w.pop(name) for name in list(w) if gone in name])
        assert named in refused("quantize", "--model", broken, "--output", tmp_path / "out")


def test_no_tokenizer(refused, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (model / "tokenizer.json").unlink()
    assert "tokenizer" in refused("quantize", "--model", model, "--output", tmp_path / "out")


@pytest.mark.parametrize("options", [[], ["--temperature", "1"]])
def test_a_model_that_computes_infinity_does_not_answer(refused, model: pathlib.Path, options: list[str]) -> None:
    change_weights(model, put("model.norm.weight", lambda w: torch.full_like(w, 3e38)))
    message = refused("generate", "--model", model, "--raw", "1", *options)
    assert "the model computes NaN or infinity as the logits after " in message
    assert "try float32" in message


def test_a_tokenizer_of_more_tokens(refused, paths: Paths, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    tokenizer = model / "tokenizer.json"
    text = tokenizer.read_text().replace('"c":', '"c": 300, "\\u0100\\u0101":')
    assert json.loads(text)["model"]["vocab"]["c"] == 300
    tokenizer.write_text(text)
    message = refused("finetune", "--model", model, "--data", paths["data"], "--output", tmp_path / "run")
    assert "token 300" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "phi3"])
def test_complete_models_load(
    paths: Paths, tmp_path: pathlib.Path, family: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Heads tied to their embeddings, buffers of older versions and foreign heads do not make a model incomplete."""
    source = tmp_path / "source"
    make(family).save_pretrained(source)
    for file in paths["model"].glob("*token*"):
        shutil.copy(file, source)
    if family == "llama":
        change_weights(source, lambda w: w.update({LAYER + "self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    if family == "qwen2":
        assert "lm_head.weight" not in load_file(source / "model.safetensors")
    if family == "phi3":
        change_weights(source, lambda w: w.update({"v_head.summary.weight": torch.ones(1, 64)}))
    assert main(["quantize", "--model", str(source), "--output", str(tmp_path / "out")]) == 0
    printed = capfd.readouterr().err
    assert ("v_head.summary.weight" in printed) == (family == "phi3")


def test_shards(refused, paths: Paths, tmp_path: pathlib.Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(paths["model"], source)
    (source / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(paths["model"]).save_pretrained(source, max_shard_size="100KB")
    arguments = ["quantize", "--model", source, "--output", tmp_path / "out", "--overwrite"]
    assert main(list(map(str, arguments))) == 0
    index = source / "model.safetensors.index.json"
    complete = index.read_text()
    shard = sorted(source.glob("model-*"))[0]
    shutil.move(shard, tmp_path / shard.name)
    assert shard.name in refused(*arguments)
    index.write_text(complete.replace(shard.name, f"../{shard.name}"))
    assert "is not a file there" in refused(*arguments)
    index.write_text('{"weight_map": 5}')
    assert "weight_map" in refused(*arguments)


Q = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w.pop(Q + "lora_A.weight"), "1 weights (of the 28 that it needs) are missing"),
        (lambda w: [w.pop(name) for name in list(w) if "lora_B" in name], "14 weights (of the 28"),
        (lambda w: w.clear(), "no weight"),
        (rename(Q + "lora_A.weight", Q + "lora_X.weight"), "q_proj"),
        (lambda w: w.update({Q.replace("layers.0", "layers.7") + "lora_A.weight": torch.ones(2, 64)}), "layers.7"),
        (put(Q + "lora_A.weight", with_first(float("nan"))), "NaN"),
        (put(Q + "lora_A.weight", lambda w: w[:1]), "q_proj"),
        (lambda w: w.update({Q + "base_layer.weight": torch.ones(64, 64)}), "overwrite"),
        (lambda w: w.update({Q + "weight": torch.ones(64, 64)}), "overwrite"),
    ],
)
def test_incomplete_adapters(refused, adapter: pathlib.Path, change: Any, named: str) -> None:
    change_weights(adapter, change)
    message = refused("generate", "--adapter", adapter, "--prompt", "1", "--max-new-tokens", "1")
    assert named in message
    assert "adapter" in message


def test_python_users_are_warned(paths: Paths, adapter: pathlib.Path) -> None:

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(paths["model"], quantization_config=qlora_ext.QLoRAConfig())

    change_weights(adapter, rename(Q + "lora_A.weight", Q + "lora_X.weight"))
    with pytest.warns(IncompleteAdapterWarning, match="is incomplete: 1 weights") as caught:
        PeftModel.from_pretrained(base(), adapter)
    messages = [str(warning.message) for warning in caught if warning.category is IncompleteAdapterWarning]
    assert len(messages) == 2  # one for missing and one for surplus weights
