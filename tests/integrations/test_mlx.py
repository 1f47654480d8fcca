"""MLX checkpoints: 4-bit embeddings and heads stay 4-bit, and weights that no 4-bit layer can hold are decoded."""

from __future__ import annotations

import json
import pathlib
import warnings
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig

import packed_models
from checkpoint_samples import mlx
from packed_models import IDS, Checkpoint, change, check_our_format, check_saved, configured, load
from qlora_ext.nn import Embedding4bit, Linear4bit, TiedLinear4bit

ALL = r"(proj|embed_tokens|lm_head)\.weight$"


def with_bits(checkpoint: Checkpoint, layer: str, bits: int, group: int) -> None:
    """Stores a layer in a number of bits of its own."""
    dense = checkpoint.dense.get_submodule(layer)
    sample = mlx(tuple(dense.weight.shape), group, torch.float16, bits)
    sample.tensors["scales"] = (torch.rand(sample.tensors["scales"].shape) * 0.02 / 2**bits).half()
    dense.weight.data = torch.from_numpy(sample.values)
    checkpoint.tensors |= {f"{layer}.{name}": t for name, t in sample.tensors.items()}
    checkpoint.config[layer] = {"group_size": group, "bits": bits}


def check_weights(model: Any, checkpoint: Checkpoint) -> None:
    for name, expected in checkpoint.dense.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        found = module.weight4bit.dequantize(torch.float32) if hasattr(module, "weight4bit") else module.weight
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_heads_stay_packed(tied: bool, tmp_path: pathlib.Path) -> None:
    checkpoint = packed_models.save(tmp_path, "llama", "mlx", packed=ALL)
    if tied:
        for name in ("weight", "scales", "biases"):
            del checkpoint.tensors[f"lm_head.{name}"]
        change(checkpoint, "", lambda t: None)
        configured(checkpoint, tie_word_embeddings=True)
        checkpoint.dense.lm_head.weight = checkpoint.dense.model.embed_tokens.weight
    model = load(checkpoint.path)
    assert isinstance(model.model.embed_tokens, Embedding4bit)
    assert isinstance(model.lm_head, TiedLinear4bit if tied else Linear4bit)
    check_weights(model, checkpoint)
    torch.testing.assert_close(model(IDS).logits, checkpoint.dense(IDS).logits, rtol=2e-4, atol=2e-4)
    check_saved(model, tmp_path / "saved", checkpoint)
    check_our_format(model, tmp_path / "ours")


@pytest.mark.parametrize("both", [False, True])
def test_the_configuration_under_its_own_name(both: bool, tmp_path: pathlib.Path) -> None:
    """MLX writes it as ``quantization``, and newer versions as ``quantization_config``, too."""
    checkpoint = packed_models.save(tmp_path, "llama", "mlx")
    configured(checkpoint, quantization=checkpoint.config)
    if not both:
        configured(checkpoint, quantization_config=None)
    model = load(checkpoint.path)
    check_weights(model, checkpoint)
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["quantization"] == saved["quantization_config"] == checkpoint.config
    model.dequantize().save_pretrained(tmp_path / "dense")
    assert torch.equal(load(tmp_path / "dense").lm_head.weight, model.lm_head.weight)


@pytest.mark.filterwarnings("ignore:2 weights of the mlx checkpoint are decoded")
def test_layers_with_settings_of_their_own(tmp_path: pathlib.Path) -> None:
    checkpoint = packed_models.save(tmp_path, "llama", "mlx", packed=ALL, keep="0.mlp.up")
    with_bits(checkpoint, "model.layers.0.self_attn.q_proj", 4, 64)
    for layer, bits in (("0.self_attn.k", 2), ("0.self_attn.v", 3), ("0.self_attn.o", 5), ("1.self_attn.q", 6)):
        with_bits(checkpoint, f"model.layers.{layer}_proj", bits, 32)
    with_bits(checkpoint, "lm_head", 8, 64)
    checkpoint.config["model.layers.0.mlp.up_proj"] = False
    change(checkpoint, "", lambda t: None)
    configured(checkpoint, quantization_config=checkpoint.config)
    with pytest.warns(
        UserWarning, match=r"2 weights of the mlx checkpoint are decoded .*: .*k_proj\.weight \(2 bits\)"
    ):
        model = load(checkpoint.path)
    assert model.model.layers[0].self_attn.q_proj.block_size == 64
    assert model.model.layers[0].self_attn.o_proj.form.code == "uint5"
    assert model.model.layers[1].self_attn.q_proj.form.code == "uint6"
    assert model.lm_head.form.code == "uint8"
    check_weights(model, checkpoint)
    check_saved(model, tmp_path / "saved", checkpoint)
    model.model.layers[0].self_attn.k_proj.weight.data[3, 5] += 1
    with pytest.raises(
        ValueError,
        match=r"^model\.layers\.0\.self_attn\.k_proj\.weight: expected the values that mlx stores",
    ):
        model.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed" / "model.safetensors").exists()
    change(checkpoint, "lm_head.weight", lambda t: t[:, :-1])
    with pytest.raises(ValueError, match=r"lm_head\.weight: expected weight to be uint32 \[128, 16\], got"):
        load(checkpoint.path)


def test_an_embedding_that_scales_its_rows(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's embedding scales its rows, and the head is tied to it."""
    sizes = packed_models.SIZES | {"tie_word_embeddings": True, "head_dim": 16}
    monkeypatch.setitem(packed_models.CONFIGS, "gemma3_text", lambda: Gemma3TextConfig(**sizes))
    checkpoint = packed_models.save(tmp_path, "gemma3_text", "mlx", packed=ALL)
    model = load(checkpoint.path)
    assert type(model.model.embed_tokens) is Embedding4bit
    check_weights(model, checkpoint)
    torch.testing.assert_close(model(IDS).logits, checkpoint.dense(IDS).logits, rtol=2e-4, atol=2e-4)
    for path in (tmp_path / "saved", checkpoint.path):  # the latter has the files that are mapped
        check_saved(model, path, checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(checkpoint.path, torch.bfloat16).save_pretrained(tmp_path / "half")
    found = packed_models.safetensors.load_file(tmp_path / "half" / "model.safetensors")
    assert torch.equal(found["model.embed_tokens.biases"], checkpoint.tensors["model.embed_tokens.biases"])
    assert "lm_head.weight" not in found


def test_experts_in_one_tensor_are_rejected(tmp_path: pathlib.Path) -> None:
    checkpoint = packed_models.save(tmp_path, "qwen3_moe", "mlx")
    for name in [name for name in checkpoint.tensors if ".experts.0." in name]:
        stacked = name.replace("experts.0", "switch_mlp")
        checkpoint.tensors[stacked] = torch.stack([checkpoint.tensors[name]] * 4)
    checkpoint.tensors = {name: t for name, t in checkpoint.tensors.items() if ".experts." not in name}
    change(checkpoint, "", lambda t: None)
    with pytest.raises(ValueError, match=r"switch_mlp.*: expected the mlx weights of each expert in tensors of their"):
        load(checkpoint.path)
