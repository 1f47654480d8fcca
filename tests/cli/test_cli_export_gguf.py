"""``qlora-ext export --to gguf-adapter``: the file has the adapter in the conventions of llama.cpp."""

from __future__ import annotations

import errno
import functools
import json
import os
import pathlib
import re
import signal
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

for library in ("transformers", "peft", "gguf"):
    pytest.importorskip(library, reason=f"{library} is not installed")

import gguf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

import qlora_app
from commands import Paths, command, here
from gguf_files import write
from tiny_configs import config_of
from tiny_models import SIZES, token_ids

Refused = Callable[..., str]
IDS = token_ids()


def read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return values, {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}


def adapt(directory: pathlib.Path, base: Any, name: str, **options: Any) -> Any:
    """Saves an adapter that is not the identity, with the base's ``name``. Returns the PEFT model."""
    torch.manual_seed(3)
    config = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False, **options}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    model.peft_config["default"].base_model_name_or_path = name
    model.save_pretrained(directory)
    return model


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
    """Adds alpha / rank · B · A to the weights of the base's file, which is what llama.cpp does."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**SIZES)
    write(AutoModelForCausalLM.from_config(config, dtype=torch.float32), tmp_path / "base.gguf", family, kinds=["F32"])

    def load(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=name, dtype=torch.float32).eval()

    model = adapt(tmp_path / "adapter", load("base.gguf"), str(tmp_path / "base.gguf"), **options)
    to = ["--to", "gguf-adapter", "--output", tmp_path / "adapter.gguf"]
    here("export", "--check", "none", "--adapter", tmp_path / "adapter", *to)
    values, matrices = read(tmp_path / "adapter.gguf")
    assert values["general.type"] == "adapter"
    assert values["adapter.type"] == "lora"
    assert values["general.architecture"] == family
    assert len(matrices) == 2 * 14
    alpha = values["adapter.lora.alpha"]
    if not options:
        assert alpha == 6.0
    _, weights = read(tmp_path / "base.gguf")
    for name in weights:
        if f"{name}.lora_a" in matrices:
            a, b = matrices[f"{name}.lora_a"], matrices[f"{name}.lora_b"]
            weights[name] = weights[name] + alpha / b.shape[1] * (b @ a)
    merged = {name: tensor.numpy() for name, tensor in weights.items()}
    nothing = types.SimpleNamespace(config=config, state_dict=dict)
    write(nothing, tmp_path / "merged.gguf", family, more=merged, kinds=["F32"])
    with torch.no_grad():
        expected, found = model(IDS).logits, load("merged.gguf")(IDS).logits
        assert (load("base.gguf")(IDS).logits - expected).norm() > 0.05 * expected.norm()
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
    adapt(tmp_path / "adapter", base, str(tmp_path / "base"), target_modules=[*names])
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    here("export", "--adapter", tmp_path / "adapter", "--to", "gguf-adapter", "--output", tmp_path / "out.gguf")
    values, matrices = read(tmp_path / "out.gguf")
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


def test_float16(paths: Paths, finished_run: pathlib.Path, tmp_path: pathlib.Path, refused: Refused) -> None:
    path = qlora_app.export(adapter=finished_run, to="gguf-adapter:f16", output=tmp_path / "half.gguf")
    assert path == tmp_path / "half.gguf"
    qlora_app.export(adapter=finished_run, to="gguf-adapter", output=tmp_path / "whole.gguf")
    (values, half), (_, whole) = read(path), read(tmp_path / "whole.gguf")
    assert (
        values["adapter.lora.alpha"]
        == json.loads((finished_run / "adapter/adapter_config.json").read_text())["lora_alpha"]
    )
    assert all(torch.equal(half[name], whole[name].half()) for name in whole)
    assert all(tensor.dtype == torch.float16 for tensor in half.values())

    large = tmp_path / "large"
    large.mkdir()
    for name, data in {p.name: p.read_bytes() for p in (finished_run / "adapter").iterdir() if p.is_file()}.items():
        (large / name).write_bytes(data)
    weights = load_file(large / "adapter_model.safetensors")
    name = next(name for name in weights if ".lora_B." in name)
    weights[name][0, 0] = 1e5
    save_file(weights, large / "adapter_model.safetensors")
    message = refused("export", "--adapter", large, "--to", "gguf-adapter:f16", "--output", tmp_path / "no.gguf")
    assert "a value that torch.float16 cannot hold; try --to gguf-adapter, which writes float32" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half.gguf", "large", "whole.gguf"]


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "has DoRA, which that target cannot hold; use --to dense"),
    "modules_to_save": (
        {"modules_to_save": ["lm_head"]},
        r"has modules saved in full \(modules_to_save\), .* use --to dense",
    ),
    "bias": ({"lora_bias": True}, r"has a bias \(lora_bias\) on .*_proj, which has none .* load it with PEFT"),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding_A.*use --to dense"),
    "rank": ({"lora_alpha": 0}, "got one whose scaling is 0 in every layer; use --to dense"),
    "alora": ({"alora_invocation_tokens": [5]}, "is activated LoRA, which only PEFT runs"),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_the_file_cannot_hold_is_rejected(
    refused: Refused, paths: Paths, tmp_path: pathlib.Path, kind: str
) -> None:
    options, message = ODD[kind]
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(paths["model"]))
    adapt(tmp_path / "adapter", base, str(paths["model"]), **options)
    told = refused(
        "export", "--adapter", tmp_path / "adapter", "--to", "gguf-adapter", "--output", tmp_path / "no.gguf"
    )
    assert re.search(message, told), told
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_bases_without_a_place_for_the_adapter_are_rejected(refused: Refused, tmp_path: pathlib.Path) -> None:
    to = ["--to", "gguf-adapter", "--output", tmp_path / "no.gguf"]
    for family, options, message in (
        (
            "gpt_neox",
            {"target_modules": ["dense"]},
            "is a gpt_neox model, expected one of llama, mistral, .*; use --to dense",
        ),
        ("qwen2", {"target_modules": ["q_proj", "lm_head"]}, "ties its output head to its embeddings"),
    ):
        directory = tmp_path / family
        config = config_of(family)
        config.tie_word_embeddings = family == "qwen2"
        config.save_pretrained(directory)
        adapt(directory / "adapter", AutoModelForCausalLM.from_config(config), str(directory), **options)
        told = refused("export", "--adapter", directory / "adapter", *to)
        assert re.search(message, told), told
    assert "expected an adapter (--adapter), got a model" in refused("export", "--model", tmp_path / "qwen2", *to)


def test_an_adapter_of_another_model_is_rejected(
    refused: Refused, finished_run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config_of("llama").save_pretrained(tmp_path / "other")
    told = refused(
        "export", "--adapter", finished_run, "--model", tmp_path / "other", "--to", "gguf-adapter", "--output",
        tmp_path / "no.gguf",
    )  # fmt: skip
    assert "does not fit its base" in told


def test_only_files_of_an_export_are_replaced(
    refused: Refused, finished_run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    export = ["export", "--adapter", finished_run, "--to", "gguf-adapter", "--output"]
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


def kill(writer: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_the_disk(writer: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def instead_of_writing(stop: Callable[[Any], None]) -> None:
    gguf.GGUFWriter.write_tensors_to_file = stop


@pytest.mark.parametrize("stop", [kill, fill_the_disk])
def test_an_interrupted_export_leaves_the_old_file(
    finished_run: pathlib.Path, tmp_path: pathlib.Path, stop: Callable[[Any], None]
) -> None:
    path = tmp_path / "a.gguf"
    export = ["export", "--adapter", finished_run, "--overwrite", "--output", path, "--to"]
    here(*export, "gguf-adapter:f16")
    before = path.read_bytes()
    done = command(*export, "gguf-adapter", before=functools.partial(instead_of_writing, stop))
    assert path.read_bytes() == before
    left = [p.name for p in tmp_path.iterdir() if p != path]
    if stop is fill_the_disk:
        assert done.returncode == 2
        assert "is full; no incomplete file was left there" in done.stderr
        assert left == []
    else:
        assert done.returncode == -signal.SIGKILL
        assert any(name.startswith(".partial-new-a.gguf-") for name in left)
    here(*export, "gguf-adapter")
    assert path.read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]
