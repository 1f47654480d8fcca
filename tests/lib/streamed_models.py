"""Saved 4-bit models to stream, and what training them gives."""

from __future__ import annotations

import pathlib
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import moe_families
import qlora_ext
from tiny_models import CONFIGS, token_ids

LAYERS = 5


def save(family: str, path: pathlib.Path) -> pathlib.Path:
    sizes = {"n_layer" if family == "gpt2" else "num_hidden_layers": LAYERS}
    if family in CONFIGS:
        config = type(CONFIGS[family]())(**{**CONFIGS[family]().to_diff_dict(), **sizes, "layer_types": None})
    else:
        name, options = moe_families.FAMILIES[family]
        config = getattr(transformers, name)(**{**moe_families.SIZES, **options, **sizes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    qlora_ext.quantize_model(model, skip=("lm_head",)).save_pretrained(path, max_shard_size="60KB")
    return path


def load(path: pathlib.Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, device_map="cpu")


def adapted(model: Any, dropout: float = 0.1, **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"target_modules": "all-linear", **options}
    model = get_peft_model(model, LoraConfig(r=4, lora_dropout=dropout, init_lora_weights=False, **options))
    return model.train()


def checkpointed(model: Any, reentrant: bool) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()


def trained(model: Any, steps: int = 3, device: str = "cpu") -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of several steps, and the adapters after these."""
    torch.manual_seed(1)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    ids, losses = token_ids().to(device), []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach().clone() for name, p in parameters.items()}


def assert_same(found: tuple[list[float], dict[str, Any]], expected: tuple[list[float], dict[str, Any]]) -> None:
    assert found[0] == expected[0]
    assert found[0][0] != found[0][-1]
    assert [name for name, t in expected[1].items() if not torch.equal(t, found[1][name])] == []
