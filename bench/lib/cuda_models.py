"""The models of bench/cuda_step.py and cuda_decode.py: random, with adapters, in 4 bits or dense, on any device."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

import qlora_ext

from .cuda_timing import SIMULATED

BF16 = torch.bfloat16
RANK = 16
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000}
TINY_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
SIZES = {"hidden_size": 4096, "intermediate_size": 14336}  # Llama 3 8B and Mixtral 8x7B
TINY_SIZES = {"hidden_size": 256, "intermediate_size": 512}  # below, bitsandbytes reads past the end of its scales
OURS, THEIRS, DENSE = "qlora_ext", "bitsandbytes", "bf16 LoRA"


def config(kind: str, tiny: bool) -> Any:
    """ "llama": a stack of blocks with grouped-query attention; "experts": a block with a mixture of experts."""
    sizes = {**TINY_SIZES, **TINY_HEADS} if tiny else {**SIZES, **HEADS}
    if kind == "llama":
        return LlamaConfig(**sizes, num_hidden_layers=1 if tiny else 8)
    return MixtralConfig(**sizes, num_hidden_layers=1, num_local_experts=4 if tiny else 8, num_experts_per_tok=2)


def with_bitsandbytes(model: Any) -> Any:
    """Replaces all linear layers but the head, as transformers does while it loads."""
    import bitsandbytes

    options = {"compress_statistics": True, "quant_type": "nf4"}
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and name != "lm_head":
                n, k = layer.weight.shape
                new = bitsandbytes.nn.Linear4bit(k, n, bias=False, compute_dtype=BF16, device="meta", **options)
                weight = layer.weight.detach()
                new.weight = bitsandbytes.nn.Params4bit(weight.cpu(), requires_grad=False, **options).to(weight.device)
                setattr(parent, name, new)
    model.is_loaded_in_4bit = True  # PEFT looks here
    return model


CONTENDERS: dict[str, Callable[[Any], Any]] = {
    OURS: lambda model: qlora_ext.quantize_model(model, compute_dtype=BF16),
    THEIRS: with_bitsandbytes,
    DENSE: lambda model: model,
}


def contenders(kind: str) -> list[str]:
    """Those that can run. bitsandbytes has no experts, and is last because it ends the process on a CUDA error."""
    theirs = kind == "llama" and importlib.util.find_spec(THEIRS) is not None
    return [OURS, DENSE, *([THEIRS] if theirs else [])]


def adapted(contender: str, kind: str, tiny: bool, device: str) -> Any:
    """The same random model for every contender, with LoRA on all its linear layers and experts."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config(kind, tiny), dtype=BF16)
    if kind == "experts" and SIMULATED:
        model.set_experts_implementation("eager")  # the simulator lacks an operator of the default, grouped_mm
    model = CONTENDERS[contender](model)
    targets: dict[str, Any] = {"target_modules": "all-linear"}
    if kind == "experts":
        targets = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
        targets["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, task_type="CAUSAL_LM", **targets))
