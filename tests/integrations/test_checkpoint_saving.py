"""Checkpoints in 4-bit formats are saved with all their tensors, or not at all, and in little memory."""

from __future__ import annotations

import pathlib
import sys
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig

import packed_models
from load_memory import peaks_of_loading_and_saving
from packed_models import CONFIGS, change, check_our_format, check_saved, configured, load, same_tensors
from qlora_ext import Form, quantize
from qlora_ext.nn import TiedLinear4bit
from qlora_ext.weight import Weight4bit
from tiny_models import same_state

NVFP4 = ("llama", "nvfp4-pack-quantized")
MOE = ("qwen3_moe", "nvfp4-pack-quantized")
MXFP4 = ("gpt_oss", "mxfp4")
Q = "model.layers.1.self_attn.q_proj"
TRAINED = [("llama", "pack-quantized"), MOE, MXFP4, ("deepseek_v3", "fp8")]


def with_more_tensors(checkpoint: Any) -> None:
    """Adds tensors for which the model has no place, and dense values in 16 bits."""
    layer = "model.layers.0.self_attn"
    checkpoint.tensors.update(
        {
            f"{layer}.k_scale": torch.tensor([0.5]),
            f"{layer}.k_proj.k_scale": torch.tensor(1.5),
            "model.layers.7.norm.weight": torch.rand(64).bfloat16(),
            "model.layers.0.codes": torch.arange(5, dtype=torch.int8),
        }
    )
    for name, t in checkpoint.tensors.items():
        if "norm" in name or "embed" in name:
            checkpoint.tensors[name] = t.bfloat16()
    change(checkpoint, "", lambda t: None)


PLAIN = [("llama", "modelopt"), ("llama", "gptq"), *TRAINED, ("mixtral", "pack-quantized")]


@pytest.mark.parametrize("case", PLAIN, ids="-".join)
def test_tensors_for_which_the_model_has_no_place_are_saved(case: tuple[str, str], tmp_path: pathlib.Path) -> None:
    checkpoint = packed_models.save(tmp_path, *case)
    with_more_tensors(checkpoint)
    load(checkpoint.path).save_pretrained(tmp_path / "saved")
    assert same_tensors(tmp_path / "saved", checkpoint.tensors)
    model = load(checkpoint.path)
    check_saved(model, checkpoint.path, checkpoint)  # over the files that it has mapped


def test_biases_of_zeros_are_saved_and_others_are_an_error(tmp_path: pathlib.Path) -> None:
    """GPTQ's writers give every layer a bias."""
    checkpoint = packed_models.save(tmp_path, "llama", "gptq")
    for name in [name for name in checkpoint.tensors if name.endswith(".qweight")]:
        checkpoint.tensors[name.replace("qweight", "bias")] = torch.zeros(checkpoint.tensors[name].shape[1]).half()
    change(checkpoint, "", lambda t: None)
    load(checkpoint.path).save_pretrained(tmp_path / "saved")
    assert same_tensors(tmp_path / "saved", checkpoint.tensors)
    checkpoint.tensors[f"{Q}.bias"][3] = 0.5
    change(checkpoint, "", lambda t: None)
    with pytest.raises(
        ValueError, match=rf"model.safetensors: {Q}.bias: expected zeros, because the model's layer has"
    ):
        load(checkpoint.path)


def test_a_tied_table_is_saved_once(tmp_path: pathlib.Path) -> None:
    checkpoint = packed_models.save(tmp_path, "llama", "pack-quantized", packed="embed_tokens")
    configured(checkpoint, tie_word_embeddings=True)
    del checkpoint.tensors["lm_head.weight"]
    change(checkpoint, "", lambda t: None)
    model = load(checkpoint.path)
    assert isinstance(model.lm_head, TiedLinear4bit)
    check_saved(model, tmp_path / "saved", checkpoint)


@pytest.mark.parametrize("case", TRAINED, ids="-".join)
def test_the_base_is_saved_under_an_adapter(case: tuple[str, str], tmp_path: pathlib.Path) -> None:
    checkpoint = packed_models.save(tmp_path, *case)
    model = load(checkpoint.path)
    experts = [name for name, _ in model.named_parameters() if name.endswith("experts.down_proj")]
    options: dict[str, Any] = {"target_parameters": experts} if experts else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about parameters
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], **options))
    adapted.get_base_model().save_pretrained(tmp_path / "saved")
    assert same_tensors(tmp_path / "saved", checkpoint.tensors)


# For each format, whether its tensors can hold new scales in its own form.
NEW = {
    ("llama", "nvfp4-pack-quantized"): False,
    ("llama", "modelopt"): False,
    ("llama", "pack-quantized-channel"): False,  # rows of 96 are three blocks
    ("llama", "pack-quantized-zero-points"): True,
    ("llama", "awq"): True,
    ("llama", "fp8-static"): False,
    ("llama", "gptq-v2-zero-points"): True,
    MOE: False,
    MXFP4: True,
}


@pytest.mark.parametrize("case", NEW, ids="-".join)
def test_new_weights_are_saved_or_rejected(case: tuple[str, str], tmp_path: pathlib.Path) -> None:
    """A weight whose scales the checkpoint's tensors cannot hold must not be lost."""
    model = load(packed_models.save(tmp_path, *case).path)
    mlp = model.model.layers[0].mlp
    layer, name = (mlp.down_proj, "weight") if case[0] == "llama" else (mlp.experts, "down_proj")
    dense = torch.randn(layer.packed_shapes[name], generator=torch.Generator().manual_seed(3))
    if NEW[case]:
        layer.set_packed(name, new_weight(dense, layer.form))
        model.save_pretrained(tmp_path / "new")
        assert same_state(load(tmp_path / "new"), model)
    for form in (Form(), *(() if NEW[case] else (layer.form,))):
        layer.set_packed(name, new_weight(dense, form))
        where = r"model\.layers\.0\.mlp\.(down_proj\.weight|experts\.down_proj)"
        with pytest.raises(ValueError, match=rf"^{where}: expected .*; call .*save_in_our_format.*$"):
            model.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved" / "model.safetensors").exists()
    if case[0] == "llama":
        check_our_format(model, tmp_path / "ours")


def new_weight(dense: torch.Tensor, form: Form) -> Weight4bit:
    """The matrix, or the stack of matrices, in that form."""
    matrices = [quantize(matrix, form) for matrix in dense.view(-1, *dense.shape[-2:])]
    return matrices[0] if dense.ndim == 2 else Weight4bit.stack(matrices)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("kind", ["nvfp4-pack-quantized", "gptq", "fp8-128"])
def test_memory(kind: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading takes the file and a tenth of it, and saving a part of one layer, though experts are a layer's half."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 32, "num_hidden_layers": 2}
    config = CONFIGS["qwen3_moe"]().to_dict() | sizes
    monkeypatch.setitem(CONFIGS, "large", lambda: Qwen3MoeConfig(**config))
    (tmp_path / "small").mkdir()
    small = packed_models.save(tmp_path / "small", "qwen3_moe", kind)
    large = packed_models.save(tmp_path, "large", kind)
    size = (large.path / "model.safetensors").stat().st_size
    peak, footprint, saving = peaks_of_loading_and_saving(large.path, small.path, tmp_path / "saved")
    assert footprint < 1.1 * size
    slack = 6 << 20  # for the allocator, and the files' pages that hold parts of two tensors
    assert peak < 1.1 * size + slack, f"peak {peak >> 20} MiB, file {size >> 20} MiB"
    assert saving < size / 4 + slack, f"peak {saving >> 20} MiB, file {size >> 20} MiB"
    found = load_file(tmp_path / "saved" / "model.safetensors")
    assert found.keys() == large.tensors.keys()
    assert all(torch.equal(found[name], t) for name, t in large.tensors.items() if not t.is_floating_point())
