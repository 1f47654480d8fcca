"""Tiny vision-language models, and an image of four patches in a text for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForImageTextToText

from tiny_models import SIZES

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
