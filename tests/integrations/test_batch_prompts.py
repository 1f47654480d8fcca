"""Decoding of batches: log-probabilities of prompts, prompts without an answer, and tokens that are not allowed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import qlora_ext
import tiny_models
from qlora_app.decoding import BatchDecoder, Sampling, batch

NUMBERS = random.Random(0)
PROMPTS = [[NUMBERS.randrange(3, 128) for _ in range(size)] for size in (1, 1, 5, 12, 30)]


@pytest.fixture(scope="module")
def model() -> Any:
    return qlora_ext.quantize_model(tiny_models.make("llama", torch.float32))


@pytest.mark.parametrize("part", [None, 7])
def test_log_probabilities_of_prompts(model: Any, part: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the model's own forward, whether tokens follow or not."""
    monkeypatch.setattr(batch, "_SCORED", 9)
    engine = BatchDecoder(model, 2, capacity=40, prompt_part=part, compiled=False)
    scored = Sampling(0, temperature=0, prompt_logprobs=True, top_logprobs=2)
    requests = [engine.submit(prompt, scored) for prompt in PROMPTS]
    more = [engine.submit(prompt, dataclasses.replace(scored, max_new_tokens=3)) for prompt in PROMPTS]
    usual = [engine.submit(prompt, Sampling(3, temperature=0)) for prompt in PROMPTS]
    whole = engine.submit([7] * 40, scored)  # fills the slot
    engine.run()
    for prompt, request, longer, other in zip(PROMPTS, requests, more, usual, strict=True):
        assert (request.tokens, request.finish_reason) == ([], "length")
        assert longer.tokens == other.tokens
        assert longer.prompt_logprobs == request.prompt_logprobs
        assert other.prompt_logprobs == []
        expected = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        exact = expected.gather(1, torch.tensor(prompt[1:], dtype=torch.int64)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(request.prompt_logprobs), exact.detach(), atol=1e-5, rtol=0)
        likeliest = [top[0][0] for top in request.prompt_top_logprobs]
        assert likeliest == expected.argmax(-1).tolist()
    assert len(whole.prompt_logprobs) == 39


def test_only_allowed_tokens_are_written(model: Any) -> None:
    """If the function fails, its sequence ends and the others go on."""

    def odd(written: Sequence[int]) -> torch.Tensor:
        """An odd token, then the one that is larger by 1."""
        allowed = torch.zeros(128, dtype=torch.bool)
        allowed[written[-1] + 1 if len(written) % 2 else torch.arange(1, 127, 2)] = True
        return allowed

    def failing(written: Sequence[int]) -> torch.Tensor:
        raise LookupError("no grammar")

    engine = BatchDecoder(model, 4, compiled=False)
    free = Sampling(8, temperature=0, stop_tokens=())
    greedy = dataclasses.replace(free, allowed_tokens=odd)
    options = [greedy, dataclasses.replace(greedy, temperature=1.0, seed=1), Sampling(8, allowed_tokens=failing), free]
    limited, drawn, failed, other = [engine.submit(PROMPTS[-1], each) for each in options]
    engine.run()
    alone = engine.submit(PROMPTS[-1], free)
    engine.run()
    for request in (limited, drawn):
        assert [token % 2 for token in request.tokens] == [1, 0] * 4
        assert request.tokens[1::2] == [token + 1 for token in request.tokens[::2]]
        assert request.logprobs[1::2] == [0] * 4
    assert isinstance(failed.error, LookupError)
    assert other.tokens == alone.tokens
