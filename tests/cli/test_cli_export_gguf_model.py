"""``qlora-ext export --to gguf:...``: the base's GGUF file with the adapter in its weights."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

for library in ("transformers", "peft", "gguf"):
    pytest.importorskip(library, reason=f"{library} is not installed")

import gguf
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

import qlora_ext
from commands import here
from gguf_files import WIDE, write
from qlora_ext.gguf import blocks
from tiny_models import token_ids

Refused = Callable[..., str]
IDS = token_ids()
TYPES = ("f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "mxfp4")


def read(path: pathlib.Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits.float()
    return found


def make_base(path: pathlib.Path, *kinds: str) -> None:
    torch.manual_seed(0)
    write(AutoModelForCausalLM.from_config(LlamaConfig(**WIDE), dtype=torch.float32), path, "llama", kinds=kinds)


def adapt(directory: pathlib.Path, base: pathlib.Path, size: float = 1.0, **options: Any) -> None:
    torch.manual_seed(5)
    config = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options}
    model = get_peft_model(read(base), LoraConfig(task_type="CAUSAL_LM", **config))
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            parameter.data.mul_(size)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(directory)


def contents(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, tuple[str, bytes]]]:
    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return values, {t.name: (t.tensor_type.name, t.data.tobytes()) for t in reader.tensors}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A directory with a base that has 4-bit and dense matrices, an adapter on all of them, and the dense export."""
    root = tmp_path_factory.mktemp("trained")
    make_base(root / "base.gguf", "Q4_0", "Q4_1", "F16", "MXFP4", "Q8_0")
    adapt(root / "adapter", root / "base.gguf")
    to = ["--to", "dense", "--dtype", "float32", "--output", root / "dense"]
    here("export", "--check", "none", "--adapter", root / "adapter", *to)
    return root


@pytest.mark.parametrize("kind", TYPES)
def test_the_merged_file_has_the_trained_model(trained: pathlib.Path, tmp_path: pathlib.Path, kind: str) -> None:
    base, out = trained / "base.gguf", tmp_path / "out.gguf"
    here("export", "--check", "none", "--adapter", trained / "adapter", "--to", f"gguf:{kind}", "--output", out)
    values, tensors = contents(out)
    assert values.pop("qlora_ext.version")
    old_values, old_tensors = contents(base)
    assert values == old_values
    assert tensors.keys() == old_tensors.keys()
    changed = {name for name in tensors if tensors[name] != old_tensors[name]}
    assert changed == {
        name for name in tensors if re.fullmatch(r"blk\.\d\.(attn|ffn)_\w+\.weight", name) and "norm" not in name
    }
    assert {tensors[name][0] for name in changed} == {kind.upper()}
    model = AutoModelForCausalLM.from_pretrained(trained / "dense").eval()
    expected = logits(model)
    assert (logits(read(base)) - expected).norm() > 0.5 * expected.norm()
    for name, parameter in model.named_parameters():  # what the type costs
        if name.endswith("_proj.weight"):
            parameter.data = rounded(parameter.data, kind)
    error, unavoidable = (logits(read(out)) - expected).norm(), (logits(model) - expected).norm()
    assert error < 1.5 * unavoidable < 0.9 * expected.norm()
    if kind in ("f16", "bf16", "q8_0"):
        assert error < 0.02 * expected.norm()


def rounded(w: torch.Tensor, kind: str) -> torch.Tensor:
    if kind.upper() in blocks.KINDS:
        return qlora_ext.quantize(w, kind).dequantize()
    number = gguf.GGMLQuantizationType[kind.upper()]
    return torch.from_numpy(gguf.dequantize(gguf.quantize(w.numpy(), number), number))


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "iq4_nl", "mxfp4"])
def test_a_base_of_that_type_keeps_its_scales(
    tmp_path: pathlib.Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    base, out = tmp_path / "base.gguf", tmp_path / "out.gguf"
    make_base(base, kind.upper())
    adapt(tmp_path / "adapter", base, 0.02, target_modules=["q_proj", "down_proj"])
    here("export", "--check", "none", "--adapter", tmp_path / "adapter", "--to", f"gguf:{kind}", "--output", out)
    printed = re.search(r"the codes retain ([\d.]+)% of the adapter's update", capfd.readouterr().out)
    assert printed
    assert 85 < float(printed[1]) < 115
    (_, before), (_, after) = contents(base), contents(out)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"blk.{i}.{name}.weight" for i in range(2) for name in ("attn_q", "ffn_down")}
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    for name in changed:
        old, new = (np.frombuffer(tensors[name][1], np.uint8).reshape(-1, size) for tensors in (before, after))
        assert (old[:, : size - elements // 2] == new[:, : size - elements // 2]).all()
        assert 0 < (old != new).mean() < 0.5


def test_a_dense_base_was_trained_in_nf4(tmp_path: pathlib.Path) -> None:
    """Without 4-bit weights in the file, training quantizes them to NF4, which the result has to contain."""
    base, out = tmp_path / "base.gguf", tmp_path / "out.gguf"
    make_base(base, "F16")
    adapt(tmp_path / "adapter", base, target_modules=["q_proj"])
    export = ["export", "--check", "none", "--adapter", tmp_path / "adapter", "--dtype", "float32", "--to"]
    here(*export, "gguf:f16", "--output", out)
    here(*export, "dense", "--output", tmp_path / "dense")
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval())
    assert (logits(read(out)) - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("kind", TYPES)
def test_a_file_without_an_adapter_gets_the_type(tmp_path: pathlib.Path, kind: str) -> None:
    base, out = tmp_path / "base.gguf", tmp_path / "out.gguf"
    make_base(base, "Q4_0", "F16", "Q8_0")
    here("export", "--check", "none", "--model", base, "--to", f"gguf:{kind}", "--output", out)
    values, tensors = contents(out)
    old_values, old_tensors = contents(base)
    assert values.pop("qlora_ext.version")
    assert values == old_values
    for name, (found, data) in tensors.items():
        is_table, is_matrix = name in ("token_embd.weight", "output.weight"), "norm" not in name
        wanted = "Q8_0" if is_table and "4" in kind else kind.upper()
        assert found == (wanted if is_matrix else old_tensors[name][0])
        assert (data == old_tensors[name][1]) == (found == old_tensors[name][0])
    expected = logits(read(base))
    limit = {"f16": 0.002, "bf16": 0.02, "q8_0": 0.05}.get(kind, 0.7)
    assert (logits(read(out)) - expected).norm() < limit * expected.norm()


def test_the_embeddings_of_a_base_change_if_their_type_is_named(tmp_path: pathlib.Path) -> None:
    base, out = tmp_path / "base.gguf", tmp_path / "out.gguf"
    make_base(base, "Q4_0")
    adapt(tmp_path / "adapter", base, target_modules=["q_proj"])
    export = ["export", "--check", "none", "--adapter", tmp_path / "adapter", "--to", "gguf:q4_0", "--output", out]
    here(*export)
    assert contents(out)[1]["token_embd.weight"] == contents(base)[1]["token_embd.weight"]
    here(*export, "--embeddings", "f16", "--overwrite")
    tensors = contents(out)[1]
    assert tensors["token_embd.weight"][0] == tensors["output.weight"][0] == "F16"
    assert tensors["blk.0.attn_k.weight"] == contents(base)[1]["blk.0.attn_k.weight"]


def test_what_is_rejected(refused: Refused, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base.gguf"
    make_base(base, "Q4_0")
    to = ["--to", "gguf:q4_0", "--output", tmp_path / "no.gguf"]
    adapt(tmp_path / "adapter", base, use_dora=True)
    capfd.readouterr()
    assert "has DoRA, which that target cannot hold; use --to dense" in refused(
        "export", "--adapter", tmp_path / "adapter", *to
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base.gguf"]
