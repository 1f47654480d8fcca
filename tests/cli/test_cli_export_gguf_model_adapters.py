"""``qlora-ext export --to gguf:...`` of adapters on models that are a directory, and of 4-bit checkpoints."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import pytest
import torch

pytest.importorskip(
    "transformers.integrations.gguf.gguf_config_mapping", reason="transformers does not build configurations by a table"
)

from peft import PeftModel

import llama_cpp_runs
import packed_models
import qlora_ext
from commands import here
from exports import adapt, logits, ours, read_gguf, retained
from tensors import error
from tiny_directories import VOCABULARY, byte_level, config_of, make, save

IDS = torch.randint(4, VOCABULARY - 2, (1, 32), generator=torch.Generator().manual_seed(1))
EXPORT = ["export", "--dtype", "float32", "--check", "none"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def four_bit(path: pathlib.Path) -> Any:
    """The model that an adapter is trained on."""
    return read_gguf(path, quantization_config=qlora_ext.QLoRAConfig()) if path.is_file() else ours(path)


ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora and patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 20}},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [3, 5]}},
    "embeddings": {"target_modules": [*LINEAR, "embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_file_has_the_adapted_model(adapter: str, tmp_path: pathlib.Path) -> None:
    base = save(tmp_path / "base", make(config_of("llama")))
    model = adapt(tmp_path / "adapter", base, ours(base), **{"target_modules": LINEAR, **ADAPTERS[adapter]})
    path = tmp_path / "out.gguf"
    here(*EXPORT, "--adapter", tmp_path / "adapter", "--to", "gguf:f16", "--output", path)
    expected = logits(model, IDS)[0]
    assert error(logits(ours(base), IDS)[0], expected) > 0.02
    assert error(logits(read_gguf(path), IDS)[0], expected) < 3e-3
    assert error(llama_cpp_runs.logits(path, IDS[0]), expected) < 3e-3


def targets_of(variant: str) -> dict[str, list[str]]:
    """All linear layers of a family, routers, and all stacks of experts."""
    if variant == "phi3":
        return {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}
    if variant in ROUTERS:
        stacks = [f"mlp.experts.{name}" for name in STACKS]
        return {"target_modules": LINEAR[:4], "target_parameters": [*stacks, ROUTERS[variant]]}
    return {"target_modules": LINEAR}


STACKS = ("gate_up_proj", "down_proj")
ROUTERS = {"qwen3_moe": "mlp.gate.weight", "gpt_oss": "mlp.router.weight"}


def merged(base: pathlib.Path, adapter: pathlib.Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of a GGUF file, decoded, and those into which PEFT has merged an adapter, in float32."""
    before = read_gguf(base).state_dict()
    return before, PeftModel.from_pretrained(read_gguf(base), adapter).merge_and_unload().state_dict()


# The families, and the types of the bases' weights.
FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "smollm3", "olmo2"), "q4_0"),
    **{"granite": "iq4_nl", "qwen3_moe": "q4_1", "gpt_oss": "mxfp4"},
}


@pytest.mark.parametrize("variant", FAMILIES)
def test_the_base_is_a_gguf_file(variant: str, tmp_path: pathlib.Path) -> None:
    """The weights of the result are those of PEFT, which merges into the decoded base: rounded once, or in 4 bits."""
    kind, base = FAMILIES[variant], tmp_path / "base.gguf"
    make_base = ["--model", save(tmp_path / "directory", make(config_of(variant))), "--to", f"gguf:{kind}"]
    here(*EXPORT, *make_base, "--output", base)
    adapt(tmp_path / "adapter", base, four_bit(base), 0.05, **targets_of(variant))
    before, after = merged(base, tmp_path / "adapter")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if name.endswith(STACKS)} <= changed
    for to in ("f16", kind) if variant in ("llama", "phi3", *ROUTERS) else ("f16",):
        out = tmp_path / f"{to}.gguf"
        here(*EXPORT, "--adapter", tmp_path / "adapter", "--to", f"gguf:{to}", "--output", out)
        found = read_gguf(out).state_dict()
        assert {name for name in found if not torch.equal(found[name], before[name])} == changed
        for name in changed:
            update = after[name] - before[name]
            if to == "f16" or name.endswith((*ROUTERS.values(),)):
                torch.testing.assert_close(found[name], after[name], rtol=2**-10, atol=2**-24)
            else:
                assert ((found[name] - before[name]) * update).sum() / update.square().sum() == pytest.approx(
                    1, abs=0.3
                )
                assert error(found[name], after[name]) < 0.2


@pytest.mark.parametrize("kind", ["q4_0", "iq4_nl", "mxfp4"])
def test_a_small_update_is_retained(kind: str, tmp_path: pathlib.Path) -> None:
    base = save(tmp_path / "base", make(config_of("llama", hidden_size=128)))
    adapt(tmp_path / "adapter", base, ours(base), 0.05, target_modules=LINEAR)
    assert (
        90
        < retained(
            here(*EXPORT, "--adapter", tmp_path / "adapter", "--to", f"gguf:{kind}", "--output", tmp_path / "out.gguf")
        )
        < 110
    )


# Checkpoints, and types that hold their codes and scales.
CHECKPOINTS = [
    ("gpt_oss", "mxfp4", "mxfp4"),
    ("llama", "mxfp4-pack-quantized", "mxfp4"),
    ("llama", "pack-quantized", "q4_0"),
    ("llama", "pack-quantized-channel", "q4_0"),
    ("llama", "gptq", "q4_0"),
]


@pytest.mark.parametrize(("family", "kind", "target"), CHECKPOINTS)
def test_4bit_weights_of_a_checkpoint_keep_their_codes(
    family: str, kind: str, target: str, tmp_path: pathlib.Path
) -> None:
    checkpoint = packed_models.save(tmp_path, family, kind)
    byte_level().save_pretrained(checkpoint.path)
    path = tmp_path / "out.gguf"
    here(*EXPORT, "--model", checkpoint.path, "--to", f"gguf:{target}", "--output", path)
    expected, found = checkpoint.dense.state_dict(), read_gguf(path).state_dict()
    names = [name for name in expected if name.endswith(("proj.weight", "experts.gate_up_proj", "experts.down_proj"))]
    names = [name for name in names if ("experts" in name) == (family == "gpt_oss")]
    assert len(names) == (4 if family == "gpt_oss" else 14)
    assert all(torch.equal(found[name], expected[name]) for name in names)


def test_an_adapter_keeps_the_scales_of_a_checkpoint(tmp_path: pathlib.Path) -> None:
    checkpoint = packed_models.save(tmp_path, "llama", "pack-quantized")
    byte_level().save_pretrained(checkpoint.path)
    adapt(tmp_path / "adapter", checkpoint.path, ours(checkpoint.path), 0.01, target_modules=["q_proj", "down_proj"])
    path = tmp_path / "out.gguf"
    assert 80 < retained(here(*EXPORT, "--adapter", tmp_path / "adapter", "--to", "gguf:q4_0", "--output", path)) < 120
    expected, found = checkpoint.dense.state_dict(), read_gguf(path).state_dict()
    changed = {
        name for name in expected if name.endswith("proj.weight") and not torch.equal(found[name], expected[name])
    }
    assert changed == {name for name in expected if re.search(r"(q|down)_proj", name)}
    for name in changed:
        blocks, scales = (expected[name] - found[name]).reshape(-1, 32), checkpoint.tensors
        scale = scales[name.removesuffix("weight") + "weight_scale"].float().reshape(-1, 1)
        assert torch.equal((blocks / scale).round() * scale, blocks)
        assert 0 < (blocks != 0).float().mean() < 0.5
