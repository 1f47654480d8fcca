"""Decoding of batches: the tokens of each sequence alone, whatever else runs, and how sequences end."""

from __future__ import annotations

import gc
import random
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import qlora_ext
import tiny_models
from batch_decoding import GREEDY, alone, eager, prompts, tiny
from qlora_app.decoding import BatchDecoder, Request, Rollouts, Sampling, batch, generate, sampling
from qlora_app.decoding.prompts import PromptReader
from qlora_app.decoding.sampling import draw


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """torch's products of float32 have the same bits for any number of rows with one thread only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def found(requests: list[Request]) -> list[tuple[list[int], list[float], str | None]]:
    return [(request.tokens, request.logprobs, request.finish_reason) for request in requests]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reproducible", [False, True])
def test_a_sequence_does_not_depend_on_the_batch(dtype: torch.dtype, reproducible: bool) -> None:
    """Tokens and log-probabilities, also in another order and with longer neighbours.

    Without ``reproducible`` as long as the kernels are the same: those of a dense head change at 5 rows.
    """
    model = qlora_ext.nn.set_compute_dtype(tiny(dtype=torch.bfloat16), dtype)
    slots = 12 if reproducible else 4
    given = prompts(9)
    options = [
        Sampling(9, temperature=(0, 1, 0.7)[i % 3], top_p=(1, 0.9)[i % 2], top_k=(0, 0, 0, 0, 20)[i % 5], seed=i)
        for i in range(len(given))
    ]

    def run(order: list[int], sequences: int = slots) -> dict[int, Any]:
        engine = eager(model, sequences, reproducible=reproducible)
        requests = [engine.submit(given[i], options[i], "__base__" if reproducible else None) for i in order]
        engine.run()
        return dict(zip(order, found(requests), strict=True))

    expected = {i: run([i])[i] for i in range(9)} if reproducible else run([*range(9)], 1)
    assert run([*range(9)]) == expected
    assert run(random.Random(1).sample(range(9), 9)) == expected


def test_layers_may_round_to_16_bits_in_a_float32_model() -> None:
    eager(qlora_ext.nn.set_compute_dtype(tiny("gpt2", torch.float32), torch.bfloat16))


def test_a_prompt_of_several_sequences_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (first, second) = tiny(), prompts(2)
    given = [first] * 6 + [second] * 5
    read: list[list[int]] = []
    usual = PromptReader.read

    def counted(self: PromptReader, *more: Any) -> torch.Tensor:
        read.append(self.prompt)
        return usual(self, *more)

    def run() -> list[Request]:
        """With four slots, so that the sequences of a group start in different steps."""
        engine = eager(model, 4)
        read.clear()
        options = [Sampling(3 + i % 4, temperature=2.0, seed=i, stop_tokens=()) for i in range(len(given))]
        requests = [engine.submit(*each) for each in zip(given, options, strict=True)]
        engine.run()
        return requests

    monkeypatch.setattr(PromptReader, "read", counted)
    requests = run()
    assert read == [first, second]
    assert all(request.prompt_logits is None for request in requests)
    with monkeypatch.context() as patch:
        patch.setattr(BatchDecoder, "_copied", lambda *_: None)
        assert found(run()) == found(requests)
    assert read == given

    engine = eager(model, 2)
    read.clear()
    long = Sampling(9, temperature=0, stop_tokens=())
    before = engine.submit(first, long)
    engine.step()
    model.get_output_embeddings().weight.data.neg_()  # as an optimizer may change weights between steps
    after = engine.submit(first, long)
    engine.run()
    assert read == [first, first]
    assert after.tokens[0] == alone(model, first, 1)[0] != before.tokens[0]


def test_log_probabilities_are_those_of_a_forward() -> None:
    model, prompt = tiny(), prompts(1)[0]
    options = Sampling(15, temperature=0.5, top_k=5, seed=3, stop_tokens=(), top_logprobs=3)
    (request,) = generate(model, [prompt], options, compiled=False)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + request.tokens])).logits[0, len(prompt) - 1 : -1]
    logprobs = (logits / 0.5).log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(request.tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(request.logprobs), expected, rtol=1e-4, atol=1e-5)
    values, ids = logprobs.topk(3)
    assert [[token for token, _ in top] for top in request.top_logprobs] == ids.tolist()
    tops = torch.tensor([[value for _, value in top] for top in request.top_logprobs])
    torch.testing.assert_close(tops, values, rtol=1e-4, atol=1e-5)


def torch_adds_in_one_order() -> bool:
    """Whether torch's attention has the same bits for four rows as for all rows of a sequence."""
    q, k, v = torch.randn(3, 2, 2, 80, 16, generator=torch.Generator().manual_seed(0)).unbind()
    mask = torch.ones(80, 80, dtype=torch.bool).tril()[None, None]
    attend = torch.nn.functional.scaled_dot_product_attention
    return torch.equal(attend(q[:, :, 60:64], k, v, mask[:, :, 60:64]), attend(q, k, v, mask)[:, :, 60:64])


@pytest.mark.parametrize("layers", [torch.float32, torch.bfloat16])
def test_sampling_has_the_bits_of_the_training_forward(layers: torch.dtype) -> None:
    """If prompts have one length, a multiple of torch's vectors, and every product has the rows of many tokens."""
    if not torch_adds_in_one_order():
        pytest.skip("torch's attention has other bits for few rows on this processor")
    config = LlamaConfig(**{**tiny_models.SIZES, "max_position_embeddings": 128, "hidden_size": 128})
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    base = qlora_ext.nn.set_compute_dtype(qlora_ext.quantize_model(dense), torch.float32)
    for _, layer in qlora_ext.nn.layers_of(base):
        layer.compute_dtype = layers
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    sequences, read, new = 64, 64, 16
    numbers = random.Random(0)
    given = [[numbers.randrange(3, 128) for _ in range(read)] for _ in range(sequences)]
    engine = eager(model, sequences, capacity=128, reproducible=True)
    requests = [engine.submit(p, Sampling(new - i % 5, seed=i, stop_tokens=())) for i, p in enumerate(given)]
    engine.run()
    ids = torch.tensor([(request.prompt + request.tokens + [0] * 9)[: read + new] for request in requests])
    with torch.enable_grad():
        logits = model.train()(input_ids=ids).logits.detach()
    for request, row in zip(requests, logits, strict=True):
        rows, tokens = row[read - 1 :][: len(request.tokens)].contiguous(), torch.tensor(request.tokens)[:, None]
        expected = rows.gather(1, tokens)[:, 0] - rows.logsumexp(-1)
        assert request.logprobs == expected.tolist()


@pytest.mark.parametrize(
    "options",
    [{}, {"top_p": 0.6}, {"top_k": 5}, {"min_p": 0.2}, {"temperature": 2.0, "top_k": 20, "top_p": 0.8, "min_p": 0.1}],
)
@pytest.mark.parametrize("sorted_first", [4, 256])
def test_draws_follow_the_filters_of_transformers(
    options: dict[str, Any], sorted_first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_SORTED_FIRST", sorted_first)
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(5)) * 2
    made = Sampling(**options)
    filters = LogitsProcessorList([TemperatureLogitsWarper(made.temperature)])
    filters += [TopKLogitsWarper(made.top_k)] if made.top_k else []
    filters += [TopPLogitsWarper(made.top_p)] if made.top_p < 1 else []
    filters += [MinPLogitsWarper(made.min_p)] if made.min_p else []
    expected = filters(torch.zeros(1, 1, dtype=torch.int64), logits.clone()).softmax(-1)[0].double()
    count = 4000
    drawn = draw(logits.expand(count, -1), [made] * count, [random.Random(i) for i in range(count)])
    seen = torch.bincount(torch.tensor([each.token for each in drawn]), minlength=40) / count
    assert not seen[expected == 0].any()
    assert ((seen - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1e-9).all()


def test_seeds() -> None:
    model, prompt = tiny(), prompts(1)[0]
    options = Sampling(12, temperature=2.0, seed=7, stop_tokens=())
    four = generate(model, [prompt] * 4, options, compiled=False)
    assert len({tuple(request.tokens) for request in four}) == 4  # prompt i has seed 7 + i
    assert [request.sampling.seed for request in four] == [7, 8, 9, 10]
    large = [
        generate(model, [prompt], Sampling(12, temperature=2.0, seed=7 + (i << 64)), compiled=False) for i in (0, 1)
    ]
    assert large[0][0].tokens == four[0].tokens[: len(large[0][0].tokens)]
    assert large[1][0].tokens != large[0][0].tokens
    torch.manual_seed(1)
    first = generate(model, [prompt], Sampling(12), compiled=False)[0]
    torch.manual_seed(1)
    assert generate(model, [prompt], Sampling(12), compiled=False)[0].tokens == first.tokens


def test_how_sequences_end() -> None:
    model = tiny()
    engine = eager(model, 2, capacity=40)
    given = prompts(6)
    told: dict[int, list[int]] = {}

    def tell(request: Request, token: int) -> None:
        told.setdefault(id(request), []).append(token)
        if request is failing and len(request.tokens) == 3:
            raise KeyError("no listener")

    endless = Sampling(temperature=0, stop_tokens=(), max_new_tokens=10)
    full = engine.submit(given[0], Sampling(temperature=0, stop_tokens=()), on_token=tell)
    failing = engine.submit(given[1], endless, on_token=tell)
    usual = alone(model, given[2], 10, eos_token_id=None)
    stopped = engine.submit(given[2], Sampling(temperature=0, stop_tokens=[usual[4]]), on_token=tell)
    cancelled, waiting = engine.submit(given[3], endless), engine.submit(given[4], endless)
    after = engine.submit(torch.tensor(given[5]), endless, on_token=lambda request, _: request.cancel())
    waiting.cancel()
    while engine.step():
        assert engine.running <= 2
        assert waiting.done  # it did not wait for a free slot
        if len(cancelled.tokens) == 4:
            cancelled.cancel()
    assert (engine.running, engine.waiting) == (0, 0)
    assert full.finish_reason == "length"
    assert len(full.prompt) + len(full.tokens) == 40
    assert full.tokens == alone(model, given[0], len(full.tokens), eos_token_id=None)
    assert (failing.finish_reason, len(failing.tokens), str(failing.error)) == ("error", 3, "'no listener'")
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == usual[: usual.index(usual[4]) + 1]
    assert (cancelled.finish_reason, len(cancelled.tokens)) == ("cancelled", 4)
    assert (waiting.finish_reason, waiting.tokens) == ("cancelled", [])
    assert (after.finish_reason, len(after.tokens)) == ("cancelled", 1)
    assert all(told[id(request)] == request.tokens for request in (full, failing, stopped))


def test_sequences_do_not_wait_for_long_prompts() -> None:
    """Neither those that run nor those with short prompts."""
    engine, (short, other) = eager(tiny(), 4, capacity=60, prompt_part=4), prompts(2, 1)
    long = other * 18  # 5 parts
    endless = Sampling(temperature=0, stop_tokens=(), max_new_tokens=30)
    running = engine.submit(short, endless)
    engine.step()
    left, first, second = (engine.submit(long, endless) for _ in range(3))
    engine.step()
    left.cancel()
    brief = engine.submit(short, Sampling(max_new_tokens=1))
    started: list[Request] = []
    while len(started) < 3:
        engine.step()
        assert len(running.tokens) == engine.steps + 1
        started += [each for each in (first, second, brief) if each.tokens and each not in started]
    assert started == [brief, first, second]
    assert left.tokens == []
    engine.run()
    assert not engine._readers
    assert first.tokens == second.tokens == alone(engine._model, long, 30, eos_token_id=None)


def test_callbacks_may_submit_but_not_step() -> None:
    engine, given = eager(tiny(), 1), prompts(2)
    more: list[Request] = []

    def once(request: Request, token: int) -> None:
        if not more:
            more.append(engine.submit(given[1], GREEDY))
            with pytest.raises(RuntimeError, match="step: expected one call at a time"):
                engine.step()

    engine.submit(given[0], GREEDY, on_token=once)
    engine.run()
    assert more[0].tokens == alone(engine._model, given[1], 12)


def test_numbers_that_are_none_end_one_sequence_and_leave_its_slot_clean() -> None:
    model = tiny()
    good = [5, 9, 17]
    expected = alone(model, good, 12)
    unused = min({*range(3, 128)} - {*good, *expected})
    model.get_input_embeddings().weight.data[unused] = torch.nan
    engine, bad = eager(model, 2), [5, unused, 17]
    requests = [engine.submit(prompt, GREEDY) for prompt in (bad, good, bad, good)]
    engine.run()
    assert [request.finish_reason == "error" for request in requests] == [True, False, True, False]
    assert isinstance(requests[0].error, FloatingPointError)
    assert requests[3].tokens == requests[1].tokens == expected
    with pytest.raises(FloatingPointError, match="logits after 3 tokens are not numbers"):
        generate(model, [good, bad], GREEDY, compiled=False)


def test_memory_does_not_grow() -> None:
    engine = eager(tiny(), 4)

    def tensors() -> int:
        for prompt in prompts(12):
            engine.submit(prompt, GREEDY)
        engine.run()
        gc.collect()
        return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())

    addresses = [cache.data_ptr() for cache in engine._caches]
    first, second = tensors(), tensors()
    assert second <= first  # fewer, if what other tests left was collected meanwhile
    assert [cache.data_ptr() for cache in engine._caches] == addresses


def test_adapters_by_request() -> None:
    model = get_peft_model(tiny(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), "first")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.eval()
    given, names = prompts(5), [None, "second", "__base__", "first", "second"]
    requests = generate(model, given, GREEDY, names, sequences=3, compiled=False)
    for prompt, name, request in zip(given, names, requests, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                assert request.tokens == alone(model, prompt, 12)
        else:
            model.set_adapter(name or "first")
            assert request.tokens == alone(model, prompt, 12)
    model.set_adapter("first")
    engine = eager(model)
    with pytest.raises(
        ValueError, match=r"adapter: expected one of \['first', 'second'\], '__base__' or None, got 'x'"
    ):
        engine.submit(given[0], adapter="x")
    ended, other = engine.submit(given[0], GREEDY, "second"), engine.submit(given[1], GREEDY)
    engine.step()
    model.delete_adapter("second")
    engine.run()
    assert (ended.finish_reason, len(ended.tokens)) == ("error", 1)
    assert other.tokens == alone(model, given[1], 12)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["first", "second"])
    with pytest.raises(ValueError, match="adapter: expected None, because several are active"):
        engine.submit(given[0], adapter="first")


def test_layers_of_16_bits_have_their_tolerance_in_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_TOLERANCE", 0.0)
    model = tiny()
    with pytest.raises(ValueError, match="its logits of a sequence in a batch differ"):
        eager(model)
    for _, layer in qlora_ext.nn.layers_of(model):
        layer.compute_dtype = torch.bfloat16
    eager(model)
    errors = iter([1.0, 0.05])  # of two pairs of sequences, the first of which amplifies rounding
    monkeypatch.setattr(batch.BatchDecoder, "_step_error", lambda *_: next(errors))
    eager(model)


def test_rollouts_use_all_positions_of_a_model() -> None:
    model = tiny().train()
    (given,) = prompts(1, longest=1)
    rollouts, trainer = Rollouts(4, compiled=False), types.SimpleNamespace(model=model)
    positions = model.config.max_position_embeddings
    (answer,) = rollouts.answers(trainer, [given], Sampling(positions - 1, stop_tokens=()))
    assert len(answer.tokens) == positions - 1
    assert model.training
    with pytest.raises(ValueError, match="capacity: expected 2 to 64 tokens, the model's positions, for .*, got 65"):
        rollouts.answers(trainer, [given], Sampling(positions))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature: expected 0 or a number from 1e-6 on, got -1"),
        ({"temperature": float("nan")}, "temperature: expected 0 or"),
        ({"top_p": 0}, "top_p: expected a number above 0 and at most 1, got 0"),
        ({"top_p": "1"}, "top_p: expected"),
        ({"top_k": -1}, "top_k: expected an integer from 0 on, got -1"),
        ({"min_p": 1.5}, "min_p: expected a number from 0 to 1"),
        ({"seed": 0.5}, "seed: expected an integer from 0 on or None"),
        ({"max_new_tokens": -1}, "max_new_tokens: expected an integer from 0 on or None, got -1"),
        ({"stop_tokens": "end"}, "stop_tokens: expected token ids, got 'end'"),
        ({"stop_tokens": [1.5]}, "stop_tokens: expected token ids"),
        ({"stop_tokens": 5}, "stop_tokens: expected token ids, got 5"),
    ],
)
def test_wrong_sampling(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_wrong_arguments() -> None:
    model = tiny()
    engine = eager(model, capacity=20)
    with pytest.raises(ValueError, match="prompt_part: expected an integer from 1 on or None, got 0"):
        eager(model, prompt_part=0)
    for arguments, message in [
        (([],), "prompt: expected at least one token, got none"),
        (([5, 128],), "prompt: expected token ids from 0 to 127, got 5 to 128"),
        (([-1],), "prompt: expected token ids"),
        (([5.5],), r"prompt: expected token ids, a list or a tensor of one dimension, got \[5.5\]"),
        ((torch.ones(1, 3, dtype=torch.int64),), "prompt: expected token ids, a list"),
        (("text",), "prompt: expected token ids, a list"),
        (([5] * 20,), "capacity: expected a prompt and max_new_tokens of together at most 20 tokens, got 20 and 1"),
        (([5] * 9, Sampling(12)), "capacity: expected .* got 9 and 12"),
        (([5], GREEDY, "x"), r"adapter: expected one of \[\], '__base__' or None, got 'x'"),
        (([5], GREEDY, ["x"]), "adapter: expected one of"),
        (([5], {"seed": 1}), "sampling: expected a Sampling, got {'seed': 1}"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.submit(*arguments)
    assert engine.waiting == 0
    for options, message in [
        ({"sequences": 0}, "sequences: expected"),
        ({"sequences": "4"}, "sequences: expected an integer from 1 on, got '4'"),
        ({"capacity": 65}, "capacity: expected 2 to 64"),
        ({"capacity": 3.5}, "capacity: expected 2 to 64"),
    ]:
        with pytest.raises(ValueError, match=message):
            eager(model, **options)
    for given, message in [
        ({"sampling": [GREEDY]}, "sampling: expected one for each of 2 prompts, got 1"),
        ({"sampling": [GREEDY, None]}, "sampling: expected a Sampling, or a list of one for each prompt, got"),
        ({"adapters": [None] * 3}, "adapters: expected one for each of 2 prompts, got 3"),
        ({"prompts": 5}, "prompts: expected a list of lists of token ids, got 5"),
        ({"model": "gpt2"}, "model: expected a language model of transformers, got str"),
    ]:
        with pytest.raises(ValueError, match=message):
            generate(**{"model": model, "prompts": [[5], [6]], "compiled": False, **given})
    assert generate(model, [], compiled=False) == []
