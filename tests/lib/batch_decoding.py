"""Models, prompts and decoders of the tests of decoding in batches."""

from __future__ import annotations

import random
from typing import Any

import torch

import qlora_ext
import tiny_models
from qlora_app.decoding import BatchDecoder, Sampling

GREEDY = Sampling(temperature=0, max_new_tokens=12)


def tiny(family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    return qlora_ext.quantize_model(tiny_models.make(family, dtype))


def prompts(count: int, longest: int = 30, seed: int = 0) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(3, 128) for _ in range(numbers.randint(1, longest))] for _ in range(count)]


def alone(model: Any, prompt: list[int], tokens: int, **more: Any) -> list[int]:
    """Greedy tokens by transformers."""
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, **more}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def eager(model: Any, sequences: int = 4, **more: Any) -> BatchDecoder:
    return BatchDecoder(model, sequences, compiled=False, **more)
