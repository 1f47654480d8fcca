"""Diffusers pipelines in 4 bits: quantized by one configuration, saved, reloaded, with their LoRA files."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PipelineQuantizationConfig,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    WanPipeline,
)
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

import qlora_ext
from qlora_ext import QLoRAConfig
from qlora_ext.integrations.peft import LoraLinear4bit
from qlora_ext.nn import Linear4bit, layers_of
from tiny_diffusers import KINDS, inputs, make, output

PARTS = ("transformer", "text_encoder", "text_encoder_2", "vae")
ABSENT = {"tokenizer": None, "tokenizer_2": None}


def flux_pipeline(dtype: torch.dtype) -> Any:
    """A Flux pipeline without tokenizers: prompts are token ids."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    clip = CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=100, projection_dim=64, bos_token_id=0, eos_token_id=2))
    t5 = T5EncoderModel(T5Config(vocab_size=100, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4))
    vae = AutoencoderKL(
        block_out_channels=(32,),
        norm_num_groups=32,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.to(dtype),
        text_encoder=clip.to(dtype),
        text_encoder_2=t5.to(dtype),
        transformer=make("flux", dtype),
        **ABSENT,
    )


def image(pipeline: Any) -> torch.Tensor:
    ids = torch.arange(8)[None]
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        out = pipeline(
            prompt_embeds=pipeline.text_encoder_2(ids)[0],
            pooled_prompt_embeds=pipeline.text_encoder(ids).pooler_output,
            height=8,
            width=8,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        )
    images: torch.Tensor = out.images.float()
    return images


def counts(pipeline: Any) -> dict[str, int]:
    return {part: sum(1 for _ in layers_of(getattr(pipeline, part))) for part in PARTS}


BY_NAME = {"quant_backend": "qlora_ext", "quant_kwargs": {"block_size": 64}}
WAYS: dict[str, Any] = {
    "quant_mapping": lambda: PipelineQuantizationConfig(quant_mapping={part: QLoRAConfig() for part in PARTS[:3]}),
    "quant_backend": lambda: PipelineQuantizationConfig(**BY_NAME, components_to_quantize=list(PARTS[:3])),
    "quant_backend for all": lambda: PipelineQuantizationConfig(**BY_NAME),
}


@pytest.mark.parametrize(
    ("way", "dtype"),
    [("quant_mapping", torch.float32), ("quant_backend", torch.bfloat16), ("quant_backend for all", torch.bfloat16)],
)
def test_a_pipeline_is_quantized_saved_and_reloaded_to_the_bit(
    way: str, dtype: torch.dtype, tmp_path: pathlib.Path
) -> None:
    flux_pipeline(dtype).save_pretrained(tmp_path / "dense")
    pipeline = FluxPipeline.from_pretrained(
        tmp_path / "dense", torch_dtype=dtype, quantization_config=WAYS[way](), **ABSENT
    )
    vae = 8 if way == "quant_backend for all" else 0
    assert counts(pipeline) == {"transformer": 30, "text_encoder": 6, "text_encoder_2": 5, "vae": vae}
    x = image(pipeline)
    assert x.std() > 0
    pipeline.save_pretrained(tmp_path / "4bit")
    again = FluxPipeline.from_pretrained(tmp_path / "4bit", torch_dtype=dtype, **ABSENT)
    assert counts(again) == counts(pipeline)
    assert torch.equal(image(again), x)


def test_a_pipeline_casts_its_4bit_parts() -> None:
    pipeline = flux_pipeline(torch.float32)
    qlora_ext.quantize_model(pipeline.transformer)
    pipeline.to(torch.bfloat16)
    assert pipeline.transformer.dtype == torch.bfloat16
    assert image(pipeline).isfinite().all()


def pipeline_of(kind: str, model: Any) -> Any:
    """A pipeline with the model and only the other components that diffusers requires."""
    if kind == "unet":
        vae, scheduler = AutoencoderKL(block_out_channels=(32,)), DDIMScheduler(steps_offset=1, clip_sample=False)
        parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return StableDiffusionPipeline(
            unet=model, vae=vae, scheduler=scheduler, text_encoder=None, tokenizer=None, **parts
        )
    scheduler = FlowMatchEulerDiscreteScheduler()
    parts = {"transformer": model, "scheduler": scheduler, "text_encoder": None, "tokenizer": None}
    if kind == "wan":
        vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        return WanPipeline(vae=vae, **parts)
    parts |= {"vae": AutoencoderKL(block_out_channels=(32,)), "text_encoder_2": None, "tokenizer_2": None}
    if kind == "flux":
        return FluxPipeline(**parts)
    return StableDiffusion3Pipeline(text_encoder_3=None, tokenizer_3=None, **parts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipelines_own_lora_files_load_fuse_and_unload(kind: str, tmp_path: pathlib.Path) -> None:
    make(kind).save_pretrained(tmp_path / "dense")
    cls = type(make(kind))
    trained = cls.from_pretrained(tmp_path / "dense", quantization_config=QLoRAConfig())
    base = output(trained, kind)
    trained.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    after = output(trained, kind)
    assert not torch.equal(after, base)
    state = get_peft_model_state_dict(trained)
    pipeline = pipeline_of(kind, cls.from_pretrained(tmp_path / "dense", quantization_config=QLoRAConfig()))
    if kind == "unet":
        pipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=convert_state_dict_to_diffusers(state))
        model = pipeline.unet
    else:
        pipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers=state)
        model = pipeline.transformer

    pipeline.load_lora_weights(tmp_path / "lora", adapter_name="a")
    assert any(isinstance(m, LoraLinear4bit) for m in model.modules())
    assert torch.equal(output(model, kind), after)
    pipeline.set_adapters(["a"], [0.0])
    torch.testing.assert_close(output(model, kind), base, rtol=1e-4, atol=1e-5)
    pipeline.set_adapters(["a"], [1.0])
    pipeline.fuse_lora()
    fused = output(model, kind)
    assert (fused - after).norm() < 0.7 * (after - base).norm()  # the merged weights are rounded to 4 bits
    pipeline.unfuse_lora()
    assert torch.equal(output(model, kind), after)

    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert torch.equal(output(model, kind), fused)
    model.save_pretrained(tmp_path / "fused")
    assert torch.equal(output(cls.from_pretrained(tmp_path / "fused"), kind), fused)


def test_a_lora_for_wider_inputs_widens_a_4bit_layer_of_flux(tmp_path: pathlib.Path) -> None:
    # As in control LoRAs of Flux, whose x_embedder has more channels than the model's.
    model = qlora_ext.quantize_model(make("flux"))
    before = model.x_embedder.dequantize()
    pipeline = pipeline_of("flux", model)
    g = torch.Generator().manual_seed(0)
    state = {
        "transformer.x_embedder.lora_A.weight": torch.randn(4, 128, generator=g),
        "transformer.x_embedder.lora_B.weight": torch.randn(64, 4, generator=g),
    }
    pipeline.load_lora_weights(state)
    widened = model.x_embedder.get_base_layer()
    assert type(widened) is torch.nn.Linear
    assert torch.equal(widened.weight[:, :64], before)
    assert not widened.weight[:, 64:].any()
    x = {**inputs("flux"), "hidden_states": torch.randn(1, 16, 128, generator=g)}
    assert model(**x)[0].isfinite().all()
    pipeline.unload_lora_weights()
    assert sum(isinstance(m, Linear4bit) for m in model.modules()) >= 29
