"""Tiny mixture-of-experts models of many families, and the treatment of their experts and routers."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import tiny_models
from qlora_ext.nn import Experts4bit, Packed4bit, quantize_model

SIZES = {**tiny_models.SIZES, "intermediate_size": 96, "num_experts_per_tok": 2}
DEEPSEEK = {
    "moe_intermediate_size": 48,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
# The class of a configuration, and its fields other than sizes.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "Qwen2-MoE": ("Qwen2MoeConfig", {"num_experts": 4, "moe_intermediate_size": 48, "decoder_sparse_step": 1}),
    "Qwen3-MoE": ("Qwen3MoeConfig", {"num_experts": 4, "moe_intermediate_size": 48, "head_dim": 16}),
    "DeepSeek-V2": ("DeepseekV2Config", DEEPSEEK),
    "DeepSeek-V3": ("DeepseekV3Config", DEEPSEEK),
    "GLM-4-MoE": ("Glm4MoeConfig", {**DEEPSEEK, "num_key_value_heads": 2, "head_dim": 16}),
    "GPT-OSS": ("GptOssConfig", {"num_local_experts": 4, "head_dim": 16, "sliding_window": 8}),
    "Llama 4": (
        "Llama4TextConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 96, "head_dim": 16},
    ),
    "OLMoE": ("OlmoeConfig", {"num_experts": 4}),
    "Phi-3.5-MoE": ("PhimoeConfig", {"num_local_experts": 4}),
    "Granite-MoE": ("GraniteMoeConfig", {"num_local_experts": 4}),
    "Jamba": ("JambaConfig", {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8}),
}
IDS = torch.randint(3, 128, (2, 6), generator=torch.Generator().manual_seed(1))


def build(family: str) -> Any:
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SIZES, **options})
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def adapted(family: str) -> Any:
    """The model in 4 bits with LoRA on "all-linear" and dropout, the defaults of the README and the command."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about routers, which have no dropout
        return get_peft_model(quantize_model(build(family)), LoraConfig(target_modules="all-linear", lora_dropout=0.05))


def _kind(modules: list[nn.Module]) -> str:
    kinds = {"4-bit" if isinstance(m, Packed4bit) else "dense" for m in modules}
    return kinds.pop() if len(kinds) == 1 else "some 4-bit"


def row(family: str) -> tuple[str, str, str, str]:
    """Whether experts and router are 4-bit or dense, and whether "all-linear" gives them an adapter."""
    model = quantize_model(build(family))
    names = {name: m for name, m in model.named_modules()}
    experts = [m for m in names.values() if isinstance(m, Experts4bit)] or [
        m for name, m in names.items() if name.endswith(".experts")
    ]
    routers = [m for name, m in names.items() if name.rpartition(".")[2] in ("gate", "router")]
    routers = [leaf for router in routers for leaf in router.modules() if [*leaf.parameters(recurse=False)]]
    assert experts
    assert routers
    wrapped = [name for name, m in adapted(family).named_modules() if isinstance(m, BaseTunerLayer)]
    on_experts = any(".experts" in name and "shared" not in name for name in wrapped)
    on_router = any(set(name.split(".")) & {"gate", "router"} for name in wrapped)
    return _kind(experts), "yes" if on_experts else "no", _kind(routers), "yes" if on_router else "no"
