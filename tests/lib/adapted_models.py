"""Tiny 4-bit models with PEFT's adapters that are not the identity, by what they are on."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from qlora_ext.nn import Experts4bit, Linear4bit, quantize_model
from tiny_models import make

BASE = "__base__"
LINEAR = {"target_modules": "all-linear"}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ON_EXPERTS = {
    "r": 3,
    "lora_alpha": 6,
    "target_modules": ["q_proj"],
    "target_parameters": EXPERTS,
    "init_lora_weights": True,  # and drawn afterwards
}
ON_EMBEDDINGS = {"target_modules": ["embed_tokens", "q_proj"]}
# A family of models, and LoRA's options.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LINEAR),
    "gpt2": ("gpt2", LINEAR | {"fan_in_fan_out": True}),
    "rslora": ("llama", LINEAR | {"use_rslora": True}),
    "rank 3": ("llama", LINEAR | {"r": 3}),
    "one layer": ("llama", {"target_modules": ["q_proj"]}),
    "dora": ("llama", LINEAR | {"use_dora": True}),
    "mixtral": ("mixtral", ON_EXPERTS),
    "one weight of experts": ("mixtral", ON_EXPERTS | {"target_parameters": EXPERTS[:1]}),
    "qwen3_moe": ("qwen3_moe", ON_EXPERTS),
    "gpt_oss": ("gpt_oss", ON_EXPERTS),
    "embeddings": ("llama", ON_EMBEDDINGS),
    "tied embeddings": ("qwen2", ON_EMBEDDINGS),
}


def base(row: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """The 4-bit model of a row, or of a family."""
    family, options = ROWS.get(row, (row, {}))
    return quantize_model(make(family, dtype), embeddings=options == ON_EMBEDDINGS)


def draw(model: Any, adapter: str = "default", std: float = 0.2) -> Any:
    """Draws new values for an adapter."""
    for name, p in model.named_parameters():
        if "lora_" in name and adapter in name:
            nn.init.normal_(p, std=std)
    return model


def adapted(model: Any = None, **options: Any) -> Any:
    """The model (default: a tiny Llama) with LoRA, by default on all linear layers."""
    torch.manual_seed(2)
    config = {"r": 4, "lora_alpha": 8, **LINEAR, "init_lora_weights": False, **options}
    model = get_peft_model(base() if model is None else model, LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    return draw(model) if config.get("target_parameters") else model


def made(row: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return adapted(base(row, dtype), **ROWS[row][1], **options)


def add_adapter(model: Any, name: str, config: Any) -> None:
    try:
        model.add_adapter(name, config)
    except ValueError as error:  # PEFT 0.19
        pytest.skip(f"this PEFT has one adapter of target_parameters: {error}")
    draw(model, name)


def loaded(model: Any, path: pathlib.Path) -> Any:
    try:
        return PeftModel.from_pretrained(model, path)
    except TypeError as error:
        if "loading_info" not in str(error):
            raise
        pytest.skip(f"this PEFT cannot load adapters of experts with this transformers: {error}")


@contextlib.contextmanager
def alone(model: Any, name: str) -> Iterator[None]:
    """The model with one adapter for all samples."""
    with model.disable_adapter() if name == BASE else contextlib.nullcontext():
        if name != BASE:
            model.set_adapter(name)
        yield
    model.set_adapter("default")


def experts_of(model: nn.Module) -> list[Experts4bit]:
    return [m for m in model.modules() if isinstance(m, Experts4bit)]


@contextlib.contextmanager
def counting_fused_calls() -> Iterator[list[str]]:
    """Records which Linear4bit calls ran with a LoRA branch inside the operator, and which without."""
    calls: list[str] = []
    original = Linear4bit.fused_forward

    def counted(self: Linear4bit, x: torch.Tensor, lora_a: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append("plain" if lora_a is None else "fused")
        return original(self, x, lora_a, *args, **kwargs)

    Linear4bit.fused_forward = counted  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        Linear4bit.fused_forward = original  # type: ignore[method-assign]
