"""Vision-language models: the language model is in 4 bits, towers and projectors stay dense unless requested."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from qlora_ext import QLoRAConfig
from qlora_ext.nn import Linear4bit, quantize_model
from tiny_models import SIZES, same_state

TEXT = {**SIZES, "intermediate_size": 96, "max_position_embeddings": 128}
IMAGE = 5  # the placeholder token of a patch
QWEN_TEXT = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
QWEN_VISION = {"depth": 2, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN = {"image_token_id": IMAGE, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS: dict[str, Any] = {
    "llava": lambda: transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**CLIP, image_size=28, patch_size=14),
        image_token_index=IMAGE,
    ),
    "qwen2_vl": lambda: transformers.Qwen2VLConfig(
        text_config=QWEN_TEXT, vision_config={**QWEN_VISION, "embed_dim": 32, "hidden_size": 64}, **QWEN
    ),
    "qwen2_5_vl": lambda: transformers.Qwen2_5_VLConfig(
        text_config=QWEN_TEXT,
        vision_config={
            **QWEN_VISION,
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        **QWEN,
    ),
}
every_family = pytest.mark.parametrize("family", CONFIGS)


def build(family: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(CONFIGS[family](), dtype=torch.float32).eval()


def inputs(family: str) -> dict[str, Tensor]:
    """An image of four patches in a text."""
    ids = torch.tensor([[1, 7, IMAGE, IMAGE, IMAGE, IMAGE, 8, 9, 10]])
    generator = torch.Generator().manual_seed(1)
    if family == "llava":
        return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28, generator=generator)}
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(16, 3 * 2 * 14 * 14, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }


def logits(model: Any, family: str, brightness: float = 1.0) -> Tensor:
    given = inputs(family)
    with torch.no_grad():
        out: Tensor = model(**{**given, "pixel_values": brightness * given["pixel_values"]}).logits
    return out


def linear(model: Any, kind: type[nn.Module]) -> set[str]:
    return {name for name, m in model.named_modules() if type(m) is kind}


@every_family
def test_the_language_model_alone_is_4bit(family: str) -> None:
    model = quantize_model(build(family))
    assert len(linear(model, Linear4bit)) == 14
    assert all(".language_model." in name for name in linear(model, Linear4bit))
    twin = build(family)
    twin.load_state_dict(quantize_model(build(family)).dequantize().state_dict())
    torch.testing.assert_close(logits(model, family), logits(twin, family), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(
        logits(model, family), logits(model, family, 3.0), atol=1e-3
    )  # the output depends on the image


@every_family
@pytest.mark.parametrize("towers", [False, True])
def test_loads_saves_and_sees(family: str, towers: bool, tmp_path: pathlib.Path) -> None:
    build(family).save_pretrained(tmp_path / "dense")
    load = AutoModelForImageTextToText.from_pretrained
    model = load(tmp_path / "dense", quantization_config=QLoRAConfig(towers=towers))
    assert linear(model, Linear4bit) == linear(quantize_model(build(family), towers=towers), Linear4bit)
    dense = linear(model, nn.Linear)
    assert dense == {"lm_head"} if towers else {"lm_head"} < dense
    model.save_pretrained(tmp_path / "4bit")
    again = load(tmp_path / "4bit")
    assert same_state(again, model)
    assert torch.equal(logits(again, family), logits(model, family))
    assert not torch.allclose(logits(model, family), logits(model, family, 3.0), atol=1e-3)


@every_family
@pytest.mark.parametrize("towers", [False, True])
def test_lora_learns_from_an_image(family: str, towers: bool) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.05)
    model = peft.get_peft_model(quantize_model(build(family), towers=towers), config).train()
    given = inputs(family)
    labels = given["input_ids"].masked_fill(given["input_ids"] == IMAGE, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(**given, labels=labels).loss
        loss.backward()
        if not losses:
            first = {name: p.grad for name, p in model.named_parameters() if "lora_B" in name}
            assert any("language_model" in name and g.abs().sum() > 0 for name, g in first.items())
            assert any("language_model" not in name and g.abs().sum() > 0 for name, g in first.items() if g is not None)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


def test_names_to_skip_say_nothing_of_towers() -> None:
    for skip in ((), ("lm_head",)):
        model = quantize_model(build("llava"), skip=skip)
        assert all(".language_model." in name or name == "lm_head" for name in linear(model, Linear4bit))
        assert ("lm_head" in linear(model, Linear4bit)) == (skip == ())
    with pytest.raises(ValueError, match="towers: expected True or False, got 'yes'"):
        QLoRAConfig(towers="yes")  # type: ignore[arg-type]
