"""The CUDA graphs of ``BatchDecoder``: which steps share one, what is captured again, and the tokens.

Tests marked ``cuda`` decode a whole model by graphs. On the CPU, a cache of functions that are called again stands in
for the graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import qlora_ext
import tiny_models
from qlora_app.decoding import BatchDecoder, CompilationError, Sampling, graphs, prepare_to_answer
from qlora_app.decoding.graphs import StepGraphs, load_graphs

PROMPTS = [[5, 9, 3], [7] * 40, [11, 2, 6, 4], [8], [3, 1] * 9]


class Functions:
    """Stands in for ``GraphCache``: calls the functions, and remembers which of their keys it has seen."""

    def __init__(self, device: torch.device) -> None:
        self.failure: str | None = None
        self.seen: dict[Hashable, int] = {}
        self.cleared = 0

    def __len__(self) -> int:
        return len(self.seen)

    def clear(self) -> None:
        self.seen.clear()
        self.cleared += 1

    def run(self, key: Hashable, function: Callable[[], object]) -> None:
        self.seen[key] = self.seen.get(key, 0) + 1
        function()


@pytest.fixture
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(graphs, "GraphCache", Functions)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more, the bits of torch's float32 products depend on the number of rows
    yield
    torch.set_num_threads(threads)


def adapted() -> Any:
    model = qlora_ext.quantize_model(tiny_models.make("llama", torch.float32))
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), "first")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return prepare_to_answer(model)


def decoder(model: Any, sequences: int = 4, **options: Any) -> BatchDecoder:
    """A decoder on the CPU with the stand-in."""
    engine = BatchDecoder(model, sequences, compiled=False, **options)
    engine._graphs = load_graphs(model, engine._caches, engine.reproducible)
    return engine


def answers(engine: BatchDecoder, adapter: str | None = None, tokens: int = 9) -> list[Any]:
    options = [Sampling(tokens - i, temperature=i % 2, seed=i, stop_tokens=()) for i in range(len(PROMPTS))]
    requests = [engine.submit(prompt, one, adapter) for prompt, one in zip(PROMPTS, options, strict=True)]
    engine.run()
    return [(request.tokens, request.logprobs, request.error) for request in requests]


@pytest.mark.usefixtures("_on_cpu")
def test_steps_share_few_graphs() -> None:
    model = adapted()
    engine = decoder(model, 3, capacity=64)
    expected = answers(BatchDecoder(model, 3, capacity=64, compiled=False))
    for cache in engine._caches:
        cache.fill_(0.25)  # what earlier sequences left
    for (tokens, logprobs, _), (usual, usual_logprobs, _) in zip(answers(engine), expected, strict=True):
        assert tokens == usual
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(usual_logprobs), rtol=1e-4, atol=1e-5)
    seen = engine._graphs._graphs.seen  # type: ignore[union-attr]
    assert set(seen) == {(2, 64), (3, 64)}
    assert sum(seen.values()) == engine.steps + 2  # and those of the self-test


def test_sizes() -> None:
    assert graphs._sizes(1, 16) == [1, 2, 4, 8, 16]
    assert graphs._sizes(1, 6) == [1, 2, 4, 6]
    assert graphs._sizes(1, 1) == [1]
    assert graphs._sizes(64, 2048) == [64, 128, 256, 512, 1024, 2048]
    assert graphs._sizes(64, 320) == [64, 128, 256, 320]


@pytest.mark.usefixtures("_on_cpu")
def test_rows_without_a_sequence_change_free_slots_only() -> None:
    model = adapted()
    lm = model.get_base_model()
    shape = (6, lm.config.num_key_value_heads, 192, lm.config.hidden_size // lm.config.num_attention_heads)
    caches = [torch.randn(shape) for _ in range(2 * lm.config.num_hidden_layers)]
    before = [cache.clone() for cache in caches]
    steps = StepGraphs(lm, caches)
    with torch.no_grad():
        logits = steps([5, 6, 7], [100, 3, 64])
        first = logits[:1].clone()
        torch.testing.assert_close(steps([5], [100]), first, rtol=1e-4, atol=1e-5)
    assert set(steps._graphs.seen) == {(4, 128), (1, 128)}  # type: ignore[attr-defined]
    for cache, old in zip(caches, before, strict=True):
        changed = (cache != old).any(-1).any(1).nonzero().tolist()
        assert changed == [[0, 100], [1, 3], [2, 64], [3, 0]]


@pytest.mark.usefixtures("_on_cpu")
def test_reproducible_steps_have_one_graph() -> None:
    engine = decoder(adapted(), 8, capacity=64, reproducible=True)
    answers(engine)
    engine._graphs._graphs.clear()  # type: ignore[union-attr]
    answers(engine)
    assert set(engine._graphs._graphs.seen) == {(8, 64)}  # type: ignore[union-attr]


def _move(model: Any) -> None:
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    layer.lora_A["first"].weight.data = layer.lora_A["first"].weight.data * 2


def _scale(model: Any) -> None:
    model.get_base_model().model.layers[-1].mlp.down_proj.scaling["first"] = 3.0


def _replace(model: Any) -> None:
    norm = model.get_base_model().model.norm
    norm.weight = torch.nn.Parameter(norm.weight.detach() * 2)


@pytest.mark.usefixtures("_on_cpu")
@pytest.mark.parametrize(
    "change", [_move, _scale, _replace, lambda model: model.set_adapter("second"), lambda model: model.merge_adapter()]
)
def test_a_changed_model_is_captured_again(change: Callable[[Any], object]) -> None:
    model = adapted()
    engine = decoder(model, reproducible=True)  # then bits do not depend on how the numbers of rows are rounded
    first = answers(engine)
    cleared = engine._graphs._graphs.cleared  # type: ignore[union-attr]
    change(model)
    model.eval()
    second = answers(engine)
    assert engine._graphs._graphs.cleared == cleared + 1  # type: ignore[union-attr]
    assert second != first
    assert second == answers(BatchDecoder(model, 4, compiled=False, reproducible=True))
    assert len(engine._graphs) > 0  # type: ignore[arg-type]


@pytest.mark.usefixtures("_on_cpu")
def test_what_runs_eagerly() -> None:
    model = adapted()
    engine = decoder(model)
    steps: Any = engine._graphs
    lm = model.get_base_model()
    assert steps.serve()
    lm.enable_input_require_grads()  # a hook that computes nothing
    assert steps.serve()
    calls: list[int] = []
    hook = lm.model.norm.register_forward_hook(lambda *_: calls.append(1))
    answers(engine)
    assert (len(steps), steps.serve()) == (0, False)
    assert "hook" in steps.obstacle
    assert len(calls) >= engine.steps  # every step called it
    hook.remove()
    assert steps.serve()
    lm.model.norm.train()
    assert not steps.serve()
    assert "training mode" in steps.obstacle
    lm.eval()
    assert steps.serve()
    torch.set_autocast_enabled("cuda", True)
    try:
        assert not steps.serve()
    finally:
        torch.set_autocast_enabled("cuda", False)
    answers(engine, "second")  # of the whole batch: PEFT chooses it for each sequence
    assert len(steps) == 0
    lm.model.norm.register_forward_hook(lambda *_: None)
    with pytest.raises(CompilationError, match="it has the hook"):
        load_graphs(model, engine._caches, False)


@pytest.mark.usefixtures("_on_cpu")
def test_a_failure_is_reported_and_costs_no_token() -> None:
    model = adapted()
    engine = decoder(model)
    steps: Any = engine._graphs
    assert (engine.compiled, engine.not_compiled) == (True, None)
    expected = answers(engine)
    steps._graphs.failure = "no memory"
    steps._graphs.clear()
    assert (engine.compiled, engine.not_compiled) == (False, "no memory")
    assert answers(engine) == expected
    assert len(steps) == 0
    assert BatchDecoder(model, compiled=False).not_compiled == "compiled is False"


@pytest.mark.usefixtures("_on_cpu")
def test_replays_that_differ_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stale(Functions):
        def run(self, key: Hashable, function: Callable[[], object]) -> None:
            if key not in self.seen:
                super().run(key, function)
            else:
                steps._logits.mul_(1.01)

    model = adapted()
    engine = BatchDecoder(model, compiled=False)
    monkeypatch.setattr(graphs, "GraphCache", Stale)
    steps: Any = StepGraphs(model.get_base_model(), engine._caches)
    with torch.no_grad(), pytest.raises(CompilationError, match="a replay of its step differs from the step"):
        steps.test()
    steps._graphs.failure = "it waits"
    with torch.no_grad(), pytest.raises(CompilationError, match="its step cannot be captured: it waits"):
        steps.test()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_on_cuda(dtype: torch.dtype) -> None:
    """Tokens and log-probabilities by graphs are those of eager steps, also after each kind of change."""
    model = adapted().to("cuda", dtype)
    options = {"capacity": 64, "reproducible": True}
    eager, engine = BatchDecoder(model, 4, compiled=False, **options), BatchDecoder(model, 4, compiled=True, **options)
    assert engine.compiled
    first = answers(eager, tokens=6)
    assert answers(engine, tokens=6) == first
    assert len(engine._graphs) == 1  # type: ignore[arg-type]
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert engine._graphs.serve()  # type: ignore[union-attr]
        with torch.no_grad():
            engine._graphs([5, 6, 7, 8], [0, 1, 2, 3])  # type: ignore[misc]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.first" in name:
                parameter.mul_(2)
    second = answers(eager, tokens=6)
    assert answers(engine, tokens=6) == second != first
    _move(model)
    third = answers(eager, tokens=6)
    assert answers(engine, tokens=6) == third != second
    assert len(engine._graphs) == 1  # type: ignore[arg-type]


@pytest.mark.cuda
def test_a_model_that_waits_for_the_device() -> None:
    model = adapted().to("cuda")
    norm = model.get_base_model().model.norm
    usual = norm.forward
    norm.forward = lambda x: usual(x) * x.sum().sign().abs().item()
    with pytest.raises(CompilationError, match="its step cannot be captured"):
        BatchDecoder(model, 2, 64, compiled=True)
    engine = BatchDecoder(model, 2, 64)
    assert "captured" in str(engine.not_compiled)
    assert answers(engine, tokens=5) == answers(BatchDecoder(model, 2, 64, compiled=False), tokens=5)
