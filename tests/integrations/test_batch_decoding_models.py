"""Decoding in batches by family of models: the tokens of transformers' own generate, and what is rejected."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma3TextConfig, MistralConfig

import tiny_models
from batch_decoding import GREEDY, alone, eager, prompts, tiny


@pytest.mark.parametrize(
    ("family", "attention", "part"),
    [("llama", "sdpa", 7), ("llama", "eager", None), ("qwen2", "sdpa", 1), ("gpt2", "sdpa", 5)],
)
def test_the_tokens_are_those_of_the_model_s_own_generate(family: str, attention: str, part: int | None) -> None:
    model = tiny(family)
    model.set_attn_implementation(attention)
    given, engine = prompts(9), eager(model, prompt_part=part)
    requests = [engine.submit(prompt, GREEDY) for prompt in given]
    engine.run()
    assert [request.tokens for request in requests] == [alone(model, prompt, 12) for prompt in given]
    assert {request.finish_reason for request in requests} <= {"stop", "length"}


WINDOW = {"sliding_window": 8}
KINDS = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "config",
    [MistralConfig(**tiny_models.SIZES, **WINDOW), Gemma3TextConfig(**tiny_models.SIZES, **WINDOW, layer_types=KINDS)],
    ids=["in all layers", "in some"],
)
def test_sequences_longer_than_a_sliding_window(config: Any, attention: str) -> None:
    def model_of(config: Any) -> Any:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.mul_(4)  # so that what the window hides would change the tokens
        model.set_attn_implementation(attention)
        return model

    model, wide = model_of(config), model_of(type(config)(**config.to_dict() | {"sliding_window": 64}))
    given, engine = prompts(9), eager(model, prompt_part=7)
    requests = [engine.submit(prompt, GREEDY) for prompt in given]
    engine.run()
    assert [request.tokens for request in requests] == [alone(model, prompt, 12) for prompt in given]
    assert [request.tokens for request in requests] != [alone(wide, prompt, 12) for prompt in given]


def without_masks(model: Any) -> Any:
    forward = model.forward

    @functools.wraps(forward)
    def ignoring(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    model.forward = ignoring
    return model


def with_config(model: Any, **settings: Any) -> Any:
    vars(model.config).update(settings)
    return model.eval()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: with_config(tiny(), layer_types=["chunked_attention", "full_attention"], attention_chunk_size=8),
            "it has chunked_attention",
        ),
        (
            lambda: with_config(tiny(), layer_types=["linear_attention", "full_attention"]),
            "its cache holds more than keys and values",
        ),
        (
            lambda: get_peft_model(tiny(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).eval(),
            "the adapter is a prompt",
        ),
        (lambda: tiny().train(), r"expected evaluation mode, got training mode; call model.eval\(\)"),
        (lambda: tiny("mpt"), "its forward takes no position_ids"),
        (lambda: tiny("blt").eval(), "transformers cannot make a cache for it: .*num_hidden_layers"),
        (lambda: without_masks(tiny()), "its logits of a sequence in a batch differ from those of the sequence alone"),
    ],
)
def test_models_that_are_rejected(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eager(make())
