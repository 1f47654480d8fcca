"""``qlora-ext export --to gguf:...``: the base's GGUF file with the adapter in its weights."""

from __future__ import annotations

import pathlib
import re

import gguf
import numpy as np
import pytest
import torch

import qlora_ext
from commands import here
from exports import Refused, adapt, contents, logits, ours, read, retained, write_base
from qlora_ext.gguf import blocks
from tensors import error
from tiny_directories import config_of, make, save

TYPES = ("f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "mxfp4")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A directory with a base that has 4-bit and dense matrices, an adapter on all of them, and the dense export."""
    root = tmp_path_factory.mktemp("trained")
    base = write_base(root / "base.gguf", "Q4_0", "Q4_1", "F16", "MXFP4", "Q8_0")
    adapt(root / "adapter", base, read(base))
    to = ["--to", "dense", "--dtype", "float32", "--output", root / "dense"]
    here("export", "--check", "none", "--adapter", root / "adapter", *to)
    return root


@pytest.mark.parametrize("kind", TYPES)
def test_the_merged_file_has_the_trained_model(trained: pathlib.Path, tmp_path: pathlib.Path, kind: str) -> None:
    base, out = trained / "base.gguf", tmp_path / "out.gguf"
    here("export", "--check", "none", "--adapter", trained / "adapter", "--to", f"gguf:{kind}", "--output", out)
    (values, tensors), (old_values, old_tensors) = contents(out), contents(base)
    assert values == old_values
    assert tensors.keys() == old_tensors.keys()
    changed = {name for name in tensors if tensors[name] != old_tensors[name]}
    assert changed == {
        name for name in tensors if re.fullmatch(r"blk\.\d\.(attn|ffn)_\w+\.weight", name) and "norm" not in name
    }
    assert {tensors[name][0] for name in changed} == {kind.upper()}
    model = read(trained / "dense")
    expected = logits(model)
    assert error(logits(read(base)), expected) > 0.5
    for name, parameter in model.named_parameters():  # what the type costs
        if name.endswith("_proj.weight"):
            parameter.data = rounded(parameter.data, kind)
    found = error(logits(read(out)), expected)
    assert found < 1.5 * error(logits(model), expected) < 0.9
    if kind in ("f16", "bf16", "q8_0"):
        assert found < 0.02


def rounded(w: torch.Tensor, kind: str) -> torch.Tensor:
    if kind.upper() in blocks.KINDS:
        return qlora_ext.quantize(w, kind).dequantize()
    number = gguf.GGMLQuantizationType[kind.upper()]
    return torch.from_numpy(gguf.dequantize(gguf.quantize(w.numpy(), number), number))


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "iq4_nl", "mxfp4"])
def test_a_base_of_that_type_keeps_its_scales(tmp_path: pathlib.Path, kind: str) -> None:
    base, out = write_base(tmp_path / "base.gguf", kind.upper()), tmp_path / "out.gguf"
    adapt(tmp_path / "adapter", base, read(base), 0.02, target_modules=["q_proj", "down_proj"])
    assert (
        85
        < retained(
            here(
                "export", "--check", "none", "--adapter", tmp_path / "adapter", "--to", f"gguf:{kind}", "--output", out
            )
        )
        < 115
    )
    (_, before), (_, after) = contents(base), contents(out)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"blk.{i}.{name}.weight" for i in range(2) for name in ("attn_q", "ffn_down")}
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    for name in changed:
        old, new = (np.frombuffer(tensors[name][1], np.uint8).reshape(-1, size) for tensors in (before, after))
        assert (old[:, : size - elements // 2] == new[:, : size - elements // 2]).all()
        assert 0 < (old != new).mean() < 0.5


# The types that "same" writes, each of a matrix: after the embeddings and seven matrices come two norms.
KEPT = [kind for kind in blocks.KINDS if kind != "NVFP4"]
KEPT = [*KEPT[:8], "F32", "F32", *KEPT[8:], "F16"]


def test_each_tensor_keeps_its_type(tmp_path: pathlib.Path) -> None:
    base, out = write_base(tmp_path / "base.gguf", *KEPT), tmp_path / "out.gguf"
    export = ["export", "--check", "none", "--output", out, "--to"]
    here(*export, "gguf:same", "--model", base)
    assert contents(out) == contents(base)
    adapt(tmp_path / "adapter", base, read(base), 0.05)
    export += ["gguf", "--overwrite", "--adapter", tmp_path / "adapter"]  # the default is gguf:same
    printed = here(*export)
    assert 85 < retained(printed) < 115
    assert "MB in gguf:same" in printed
    (_, before), (_, after) = contents(base), contents(out)
    assert {name: kind for name, (kind, _) in after.items()} == {name: kind for name, (kind, _) in before.items()}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {
        name for name in before if re.fullmatch(r"blk\.\d\.(attn|ffn)_\w+\.weight", name) and "norm" not in name
    }
    assert {before[name][0] for name in changed} == {*KEPT} - {"F32"}
    here(*export, "--embeddings", "f16")
    assert contents(out)[1]["token_embd.weight"][0] == "F16"


@pytest.mark.parametrize("kind", ["IQ3_XXS", "NVFP4", None])
def test_what_does_not_keep_its_type(kind: str | None, tmp_path: pathlib.Path, refused: Refused) -> None:
    base = save(tmp_path / "base", make(config_of("llama"))) if kind is None else write_base(tmp_path / "b.gguf", kind)
    adapt(tmp_path / "adapter", base, ours(base) if kind is None else read(base), target_modules=["q_proj"])
    export = ["export", "--check", "none", "--adapter", tmp_path / "adapter", "--output", tmp_path / "out.gguf", "--to"]
    expected = "base that is a GGUF file" if kind is None else f"type that can be written, got {kind}"
    assert f"expected a {expected}" in refused(*export, "gguf:same")
    if kind == "NVFP4":
        assert "MB in gguf:q8_0" in here(*export, "gguf")


def test_a_dense_base_was_trained_in_nf4(tmp_path: pathlib.Path) -> None:
    """Without 4-bit weights in the file, training quantizes them to NF4, which the result has to contain."""
    base, out = write_base(tmp_path / "base.gguf", "F16"), tmp_path / "out.gguf"
    adapt(tmp_path / "adapter", base, read(base), target_modules=["q_proj"])
    export = ["export", "--check", "none", "--adapter", tmp_path / "adapter", "--dtype", "float32", "--to"]
    here(*export, "gguf:f16", "--output", out)
    assert "MB in gguf:q8_0" in here(*export, "gguf", "--output", tmp_path / "default.gguf")
    here(*export, "dense", "--output", tmp_path / "dense")
    assert error(logits(read(out)), logits(read(tmp_path / "dense"))) < 1e-3


@pytest.mark.parametrize("kind", TYPES)
def test_a_file_without_an_adapter_gets_the_type(tmp_path: pathlib.Path, kind: str) -> None:
    base, out = write_base(tmp_path / "base.gguf", "Q4_0", "F16", "Q8_0"), tmp_path / "out.gguf"
    here("export", "--check", "none", "--model", base, "--to", f"gguf:{kind}", "--output", out)
    (values, tensors), (old_values, old_tensors) = contents(out), contents(base)
    assert values == old_values
    for name, (found, data) in tensors.items():
        is_table, is_matrix = name in ("token_embd.weight", "output.weight"), "norm" not in name
        wanted = "Q8_0" if is_table and "4" in kind else kind.upper()
        assert found == (wanted if is_matrix else old_tensors[name][0])
        assert (data == old_tensors[name][1]) == (found == old_tensors[name][0])
    limit = {"f16": 0.002, "bf16": 0.02, "q8_0": 0.05}.get(kind, 0.7)
    assert error(logits(read(out)), logits(read(base))) < limit


def test_the_embeddings_of_a_base_change_if_their_type_is_named(tmp_path: pathlib.Path) -> None:
    base, out = write_base(tmp_path / "base.gguf", "Q4_0"), tmp_path / "out.gguf"
    adapt(tmp_path / "adapter", base, read(base), target_modules=["q_proj"])
    export = ["export", "--check", "none", "--adapter", tmp_path / "adapter", "--to", "gguf:q4_0", "--output", out]
    here(*export)
    assert contents(out)[1]["token_embd.weight"] == contents(base)[1]["token_embd.weight"]
    here(*export, "--embeddings", "f16", "--overwrite")
    tensors = contents(out)[1]
    assert tensors["token_embd.weight"][0] == tensors["output.weight"][0] == "F16"
    assert tensors["blk.0.attn_k.weight"] == contents(base)[1]["blk.0.attn_k.weight"]
