"""``qlora-ext export --to gguf-adapter``: the file has the adapter in the conventions of llama.cpp."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import qlora_app
from commands import here
from exports import Refused, adapt, logits, matrices_of, read, with_adapter_file
from gguf_files import write
from tensors import error
from tiny_configs import config_of
from tiny_models import SIZES, token_ids

IDS = token_ids()


def permuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of the rows of q and k: halves of a head become even and odd rows."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "mlp.up_proj": 3}, "alpha_pattern": {"layers.1.mlp.up_proj": 20}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_the_merged_file_computes_what_the_adapter_does(
    tmp_path: pathlib.Path, family: str, options: dict[str, Any]
) -> None:
    base, path = tmp_path / "base.gguf", tmp_path / "adapter.gguf"
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**SIZES)
    write(AutoModelForCausalLM.from_config(config, dtype=torch.float32), base, family, kinds=["F32"])
    expected = logits(adapt(tmp_path / "adapter", base, read(base), lora_alpha=6, **options), IDS)
    here("export", "--check", "none", "--adapter", tmp_path / "adapter", "--to", "gguf-adapter", "--output", path)
    values, matrices = matrices_of(path)
    assert values["general.type"] == "adapter"
    assert values["adapter.type"] == "lora"
    assert values["general.architecture"] == family
    assert len(matrices) == 2 * 14
    if not options:
        assert values["adapter.lora.alpha"] == 6.0
    assert error(logits(read(base), IDS), expected) > 0.05
    found = logits(read(with_adapter_file(base, path, tmp_path / "merged.gguf")), IDS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# The file's names of q, down and the fused or plain up projection of layer 1, and whether q and k are permuted.
FILE_NAMES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "smollm3": ("smollm3", True),
    "granite": ("granite", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "qwen3_moe": ("qwen3moe", False),
    "gemma2": ("gemma2", False),
    "gemma3_text": ("gemma3", False),
    "phi3": ("phi3", False),
    "olmo2": ("olmo2", False),
    "gpt_oss": ("gpt-oss", False),
}
ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
MLP = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
PHI3 = {"qkv_proj": "attn_qkv", "o_proj": "attn_output", "gate_up_proj": "ffn_up", "down_proj": "ffn_down"}


@pytest.mark.parametrize("family", FILE_NAMES)
def test_names_and_rows_of_every_family(tmp_path: pathlib.Path, family: str) -> None:
    architecture, is_permuted = FILE_NAMES[family]
    config = config_of(family)
    config.architectures = None
    config.save_pretrained(tmp_path / "base")
    names = PHI3 if family == "phi3" else ATTENTION if "moe" in family or "oss" in family else ATTENTION | MLP
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    adapt(tmp_path / "adapter", tmp_path / "base", base, target_modules=[*names])
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    here("export", "--adapter", tmp_path / "adapter", "--to", "gguf-adapter", "--output", tmp_path / "out.gguf")
    values, matrices = matrices_of(tmp_path / "out.gguf")
    assert values["general.architecture"] == architecture
    expected = {}
    for name, matrix in stored.items():
        found = re.fullmatch(
            r"base_model\.model\.model\.layers\.(\d)\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])\.weight", name
        )
        assert found, name
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(found[2])
        if is_permuted and found[3] == "B" and heads:
            matrix = permuted(matrix, heads)
        expected[f"blk.{found[1]}.{names[found[2]]}.weight.lora_{found[3].lower()}"] = matrix
    assert matrices.keys() == expected.keys()
    assert all(torch.equal(matrices[name], expected[name]) for name in expected)


def test_float16(finished_run: pathlib.Path, tmp_path: pathlib.Path, refused: Refused) -> None:
    path, large = tmp_path / "half.gguf", tmp_path / "large"
    assert qlora_app.export(adapter=finished_run, to="gguf-adapter:f16", output=path, check="none") == path
    qlora_app.export(adapter=finished_run, to="gguf-adapter", output=tmp_path / "whole.gguf", check="none")
    (values, half), (_, whole) = matrices_of(path), matrices_of(tmp_path / "whole.gguf")
    config = json.loads((finished_run / "adapter" / "adapter_config.json").read_text())
    assert values["adapter.lora.alpha"] == config["lora_alpha"]
    assert all(torch.equal(half[name], whole[name].half()) for name in whole)
    assert all(tensor.dtype == torch.float16 for tensor in half.values())

    shutil.copytree(finished_run / "adapter", large)
    weights = load_file(large / "adapter_model.safetensors")
    weights[next(name for name in weights if ".lora_B." in name)][0, 0] = 1e5
    save_file(weights, large / "adapter_model.safetensors")
    message = refused("export", "--adapter", large, "--to", "gguf-adapter:f16", "--output", tmp_path / "no.gguf")
    assert "a value that torch.float16 cannot hold; try --to gguf-adapter, which writes float32" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half.gguf", "large", "whole.gguf"]


def test_bases_without_a_place_for_the_adapter_are_rejected(
    refused: Refused, finished_run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    to = ["--to", "gguf-adapter", "--output", tmp_path / "no.gguf"]
    base = tmp_path / "gpt_neox"
    config = config_of("gpt_neox")
    config.save_pretrained(base)
    adapt(base / "adapter", base, AutoModelForCausalLM.from_config(config), target_modules=["dense"])
    told = refused("export", "--adapter", base / "adapter", *to)
    assert re.search("is a gpt_neox model, expected one of llama, mistral, .*; use --to dense", told), told
    assert "expected an adapter (--adapter), got a model" in refused("export", "--model", base, *to)
    config_of("llama").save_pretrained(tmp_path / "other")
    assert "does not fit its base" in refused("export", "--adapter", finished_run, "--model", tmp_path / "other", *to)


def test_only_files_of_an_export_are_replaced(
    refused: Refused, finished_run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    export = ["export", "--check", "none", "--adapter", finished_run, "--to", "gguf-adapter", "--output"]
    assert "expected the name of a file that ends in .gguf" in refused(*export, tmp_path / "directory")
    assert f"there is no directory {tmp_path / 'missing'}" in refused(*export, tmp_path / "missing" / "a.gguf")
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF, but of somebody else")
    assert "exists; name another file, or add --overwrite" in refused(*export, path)
    assert "this command did not write it" in refused(*export, path, "--overwrite")
    assert path.read_bytes() == b"GGUF, but of somebody else"
    path.unlink()
    here(*export, path)
    first = path.read_bytes()
    assert "exists; name another file, or add --overwrite" in refused(*export, path)
    here(*export, path, "--overwrite")
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]
