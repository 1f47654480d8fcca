"""Random diffusers models of the kinds that differ in their layers, small enough to build in a test."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, WanTransformer3DModel

MODELS: dict[str, Any] = {
    "flux": lambda: FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    ),
    "sd3": lambda: SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        caption_projection_dim=64,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        out_channels=4,
    ),
    "unet": lambda: UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=8,
        norm_num_groups=16,
    ),
    "wan": lambda: WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=64,
        freq_dim=64,
        ffn_dim=64,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ),
}
KINDS = list(MODELS)


def make(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model with different parameters in every layer. The modules that it keeps in float32 stay in float32."""
    torch.manual_seed(seed)
    model = MODELS[kind]().eval()
    kept = set(model._keep_in_fp32_modules or ())
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.1)
        if kept.isdisjoint(name.split(".")):
            p.data = p.data.to(dtype)
    return model


def inputs(kind: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The arguments of a call of this model, the same for every call."""
    g = torch.Generator().manual_seed(7)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    if kind == "flux":
        return {
            "hidden_states": rand(1, 16, 64),
            "encoder_hidden_states": rand(1, 8, 64),
            "pooled_projections": rand(1, 64),
            "timestep": torch.tensor([0.5], dtype=dtype),
            "guidance": torch.tensor([3.5], dtype=dtype),
            "img_ids": torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], 1),
            "txt_ids": torch.zeros(8, 3),
            "return_dict": False,
        }
    if kind == "sd3":
        return {
            "hidden_states": rand(1, 4, 8, 8),
            "encoder_hidden_states": rand(1, 8, 64),
            "pooled_projections": rand(1, 64),
            "timestep": torch.tensor([5]),
            "return_dict": False,
        }
    if kind == "unet":
        return {
            "sample": rand(1, 4, 16, 16),
            "timestep": torch.tensor([5]),
            "encoder_hidden_states": rand(1, 8, 64),
            "return_dict": False,
        }
    return {
        "hidden_states": rand(1, 4, 2, 8, 8),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": rand(1, 8, 64),
        "return_dict": False,
    }


def output(model: Any, kind: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        y: torch.Tensor = model(**inputs(kind, dtype))[0]
    return y.float()
