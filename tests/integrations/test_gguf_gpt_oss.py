"""gpt-oss in GGUF files, as llama.cpp converts it: MXFP4 experts whose gate and up rows are stacks of their own."""

from __future__ import annotations

import pathlib
import warnings
from typing import Any

import pytest
import torch

pytest.importorskip(
    "transformers.integrations.gguf.gguf_config_mapping", reason="transformers does not build configurations by a table"
)

from transformers import AutoConfig, AutoModelForCausalLM

import packed_models
from gguf_files import write_gpt_oss
from packed_models import IDS, Checkpoint
from qlora_ext import QLoRAConfig
from qlora_ext.nn import Experts4bit, layers_of
from tiny_models import same_state

FILE = "gpt-oss.gguf"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """An MXFP4 checkpoint of gpt-oss, and beside it the same weights in a GGUF file."""
    found = packed_models.save(tmp_path_factory.mktemp("gpt_oss"), "gpt_oss", "mxfp4")
    write_gpt_oss(found, found.path.parent / FILE)
    return found


def load(directory: pathlib.Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, gguf_file=FILE, dtype=torch.float32, **options).eval()


def test_the_configuration(checkpoint: Checkpoint) -> None:
    found, expected = AutoConfig.from_pretrained(checkpoint.path.parent, gguf_file=FILE), checkpoint.dense.config
    for name in (
        "model_type", "architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok", "sliding_window", "layer_types",
        "rope_parameters", "rms_norm_eps", "vocab_size", "max_position_embeddings", "tie_word_embeddings", "hidden_act",
        "swiglu_limit", "attention_bias", "eos_token_id",
    ):  # fmt: skip
        value = getattr(expected, name)
        value = pytest.approx(value) if isinstance(value, float) else value  # float32 in the file
        assert getattr(found, name) == value, name


def test_the_weights_are_those_of_the_checkpoint(checkpoint: Checkpoint) -> None:
    directory = checkpoint.path.parent
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*of the linear weights are quantized")
        model = load(directory, quantization_config=QLoRAConfig())
    state, expected = model.state_dict(), checkpoint.dense.state_dict()
    packed = {name: layer for name, layer in layers_of(model) if isinstance(layer, Experts4bit)}
    assert len(packed) == model.config.num_hidden_layers
    others = {f"{name}.weight": layer for name, layer in layers_of(model) if name not in packed}
    assert {(name.split(".")[-2], layer.form.code) for name, layer in others.items()} == {("q_proj", "int8")}
    twin = AutoModelForCausalLM.from_pretrained(
        checkpoint.path, dtype=torch.float32, quantization_config=QLoRAConfig(), device_map="cpu"
    )
    for name, layer in packed.items():  # the values, because ggml's zeros have no sign
        for weight in layer.packed_shapes:
            found, wanted = (m.dequantize(weight, torch.float32) for m in (layer, twin.get_submodule(name)))
            assert torch.equal(found, wanted)
    decoded = {name: layer.dequantize(torch.float32) for name, layer in others.items()}
    for name, t in (state | decoded).items():
        if name in expected and not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            torch.testing.assert_close(t, expected[name], rtol=0, atol=1e-2 if name in decoded else 0, msg=name)
    expected |= decoded
    checkpoint.dense.load_state_dict(expected)
    y = checkpoint.dense(IDS).logits
    torch.testing.assert_close(model(IDS).logits, y, rtol=2e-4, atol=2e-4)
    assert torch.equal(model.dequantize()(IDS).logits, y)


def test_saved_in_our_format_and_loaded_again(checkpoint: Checkpoint, tmp_path: pathlib.Path) -> None:
    model = load(checkpoint.path.parent, quantization_config=QLoRAConfig())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert same_state(model, again)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("absent", ["blk.1.ffn_up_exps.weight", "blk.1.ffn_gate_exps.bias"])
def test_half_of_the_experts_is_missing(absent: str, checkpoint: Checkpoint, tmp_path: pathlib.Path) -> None:
    write_gpt_oss(checkpoint, tmp_path / FILE, without=absent)
    with pytest.raises(ValueError, match=r"gpt-oss\.gguf: blk\.1\.ffn_\w+_exps\.\w+: incomplete: expected \d+ "):
        load(tmp_path, quantization_config=QLoRAConfig())
