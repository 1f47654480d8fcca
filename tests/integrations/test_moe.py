"""Mixture-of-experts models and embeddings with transformers and PEFT."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

import qlora_ext
from qlora_ext import QLoRAConfig
from qlora_ext.nn import Embedding4bit, Experts4bit, Linear4bit, TiedLinear4bit, quantize_model
from tiny_models import make, same_state, token_ids

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, intermediate_size=96, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES,
        intermediate_size=96,
        moe_intermediate_size=48,  # rows that are not a multiple of the block
        num_experts=6,
        head_dim=16,
        norm_topk_prob=True,
        tie_word_embeddings=True,
    ),
}
every_family = pytest.mark.parametrize("family", CONFIGS)


def moe(family: str = "mixtral", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]), dtype=dtype)
    for name, p in model.named_parameters():
        if "gate.weight" in name:
            nn.init.normal_(p)  # every expert gets tokens
    return model.eval()


def experts_of(model: nn.Module) -> list[Experts4bit]:
    return [m for m in model.modules() if isinstance(m, Experts4bit)]


def load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options)


@every_family
def test_a_model_of_experts_is_that_of_the_decoded_ones(family: str) -> None:
    model = quantize_model(moe(family))
    assert len(experts_of(model)) == 2
    ids = token_ids()
    outputs, gradients = [], []
    dense = moe(family)
    dense.load_state_dict(quantize_model(moe(family)).dequantize().state_dict())
    for m in (model, dense):
        embeds = m.get_input_embeddings()(ids).detach().requires_grad_()
        out = m(inputs_embeds=embeds, labels=ids)
        out.loss.backward()
        outputs.append(out.logits.detach())
        gradients.append(embeds.grad)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


@pytest.mark.usefixtures("native_bfloat16")
@every_family
@pytest.mark.parametrize("how", ["from_pretrained", "quantize_model"])
def test_quantizes_saves_and_loads_bit_for_bit(family: str, how: str, tmp_path: Path) -> None:
    moe(family, torch.bfloat16).save_pretrained(tmp_path / "dense")
    quantized = load(tmp_path / "dense", quantization_config=QLoRAConfig(block_size=32))
    model = quantize_model(load(tmp_path / "dense"), block_size=32)
    assert same_state(model, quantized)
    if how == "from_pretrained":
        model = quantized
    model.save_pretrained(tmp_path / "4bit", max_shard_size="40KB")
    again = load(tmp_path / "4bit")
    assert len(experts_of(again)) == 2
    assert same_state(again, model)
    assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)
    packed = sum(w4.nbytes for m in experts_of(model) for w4 in map(m.packed_weight, m.packed_shapes))
    dense = sum(p.nbytes for name, p in moe(family, torch.bfloat16).named_parameters() if ".experts." in name)
    assert packed == pytest.approx(dense * (4 + 8 / 32) / 16, rel=0.02)


@every_family
def test_dequantize_gives_the_dense_model(family: str, tmp_path: Path) -> None:
    moe(family, torch.bfloat16).save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", quantization_config=QLoRAConfig())
    expected = model(token_ids()).logits
    original = load(tmp_path / "dense")
    dense = model.dequantize()
    assert {n: type(m) for n, m in dense.named_modules()} == {n: type(m) for n, m in original.named_modules()}
    torch.testing.assert_close(dense(token_ids()).logits, expected, rtol=0.05, atol=0.05)
    dense.save_pretrained(tmp_path / "again")
    names = [json.loads(f.read_bytes()[8 : 8 + int.from_bytes(f.read_bytes()[:8], "little")]) for f in files(tmp_path)]
    assert names[0].keys() == names[1].keys()  # the original names, one weight per expert
    assert same_state(load(tmp_path / "again"), dense)


def files(path: Path) -> list[Path]:
    return [path / name / "model.safetensors" for name in ("dense", "again")]


def test_skipped_experts_stay_dense(tmp_path: Path) -> None:
    moe().save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", quantization_config=QLoRAConfig(skip_modules=["lm_head", "layers.1.mlp"]))
    assert len(experts_of(model)) == 1
    model.save_pretrained(tmp_path / "4bit")
    assert same_state(load(tmp_path / "4bit"), model)
    model = quantize_model(moe(), skip=["lm_head", "layers.1.mlp"])
    model.save_pretrained(tmp_path / "4bit")
    assert same_state(load(tmp_path / "4bit"), model)


def test_generates() -> None:
    ids = token_ids()
    model = quantize_model(moe("qwen3_moe"))
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape == (2, ids.shape[1] + 3)


@pytest.mark.usefixtures("native_bfloat16")
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("skip", [None, [], ["embed_tokens", "wte", "lm_head"]])
def test_embeddings_are_quantized_where_asked(family: str, skip: list[str] | None, tmp_path: Path) -> None:
    dense = moe(family, torch.bfloat16) if family in CONFIGS else make(family)
    tied = dense.config.tie_word_embeddings
    dense.save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", quantization_config=QLoRAConfig(embeddings=True, skip_modules=skip))
    expected = quantize_model(dense, skip=("lm_head",) if skip is None else skip, embeddings=True)
    assert same_state(model, expected)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if skip:
        assert (type(table), type(head)) == (nn.Embedding, nn.Linear)
        assert (table.weight is head.weight) == tied
    else:
        assert isinstance(table, Embedding4bit)
        assert type(head) is (TiedLinear4bit if tied else nn.Linear if skip is None else Linear4bit)
        assert (table.weight is head.weight) == tied
    logits = model(token_ids()).logits
    for m in (model, expected):
        m.save_pretrained(tmp_path / "4bit")
        again = load(tmp_path / "4bit")
        assert same_state(again, model)
        assert torch.equal(again(token_ids()).logits, logits)
        assert again.get_memory_footprint() == model.get_memory_footprint()
    plain = again.dequantize()
    assert (type(plain.get_input_embeddings()), type(plain.get_output_embeddings())) == (nn.Embedding, nn.Linear)
    assert (plain.get_input_embeddings().weight is plain.get_output_embeddings().weight) == tied
    torch.testing.assert_close(plain(token_ids()).logits, logits, rtol=0.05, atol=0.05)
    plain.save_pretrained(tmp_path / "again")
    assert same_state(load(tmp_path / "again"), plain)


def test_experts_of_a_bitsandbytes_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from safetensors.torch import load_file, save_file
    from transformers import BitsAndBytesConfig

    moe(dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = load(tmp_path / "dense", quantization_config=config)
    theirs.save_pretrained(tmp_path / "bnb")
    model = load(tmp_path / "bnb", quantization_config=QLoRAConfig())
    assert torch.equal(model.model.layers[1].mlp.experts.down_proj, theirs.model.layers[1].mlp.experts.down_proj)
    model.save_pretrained(tmp_path / "4bit")
    assert same_state(load(tmp_path / "4bit"), model)

    # As in transformers < 5: every expert is a separate, quantized module.
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    file = tmp_path / "bnb" / "model.safetensors"
    state = load_file(file)
    one = qlora_ext.quantize_nf4(torch.randn(96, 64)).to_bitsandbytes(name)
    save_file({**{key: t for key, t in state.items() if key != name}, **one}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"expected stacked experts.* got .*experts.0.w1"):
        load(tmp_path / "bnb", quantization_config=QLoRAConfig())
