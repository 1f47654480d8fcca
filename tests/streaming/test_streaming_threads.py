"""Several threads use one streamed model at once: each gets the results of a resident model, without deadlock."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import pathlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qlora_ext.streaming import stream, streaming_of
from qlora_ext.streaming.sources import FileSource
from streamed_models import adapted, checkpointed, load, save
from tiny_models import token_ids

TIMEOUT = 120


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save("Mixtral", tmp_path_factory.mktemp("mixtral"))


def streamed(path: pathlib.Path) -> Any:
    return stream(load(path), source="disk").eval()


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits
    return logits


def in_threads(*tasks: Callable[[], None]) -> None:
    """Runs the tasks concurrently. Raises the exception of a task, and fails if a task does not end."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(tasks))

    def run(task: Callable[[], None]) -> None:
        start.wait(TIMEOUT)
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_every_thread_gets_its_own_answers(family: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(family)
    resident, model = load(path).eval(), streamed(path)
    # One of them has a single token, for which single experts are read.
    rows = [torch.randint(0, 128, (1, n), generator=torch.Generator().manual_seed(n)) for n in (24, 1, 3)]
    expected = [logits_of(resident, ids) for ids in rows]

    def ask(i: int) -> None:
        for _ in range(12):
            assert torch.equal(logits_of(model, rows[i]), expected[i])

    in_threads(*(lambda i=i: ask(i) for i in range(len(rows))))


@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpointed", "reentrant"])
def test_one_thread_trains_while_others_ask_and_train(llama: pathlib.Path, reentrant: bool) -> None:
    ids = token_ids()

    def gradients(model: Any) -> list[torch.Tensor]:
        parameters = [p for p in model.parameters() if p.requires_grad]
        found: list[torch.Tensor] = []
        for _ in range(3):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            found += [p.grad.clone() for p in parameters]
            model.zero_grad()
        return found

    resident = adapted(load(llama), dropout=0.0)
    model = adapted(streamed(llama), dropout=0.0)
    for each in (resident, model):
        checkpointed(each, reentrant)
    expected = gradients(resident), logits_of(resident, ids)

    def train() -> None:
        assert all(torch.equal(*pair) for pair in zip(gradients(model), expected[0], strict=True))

    def ask() -> None:
        for _ in range(10):
            assert torch.equal(logits_of(model, ids), expected[1])

    in_threads(train, ask, ask)


def test_generation_in_one_thread_and_a_compiled_layer_in_another(llama: pathlib.Path) -> None:
    resident, model = load(llama).eval(), streamed(llama)
    ids = token_ids()[:1, :4]
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    written = resident.generate(ids, **options)
    x = torch.randn(4, 64).bfloat16()
    expected = resident.model.layers[1].mlp(x)
    compiled = torch.compile(model.model.layers[1].mlp, backend="eager")

    def ask() -> None:
        for _ in range(30):
            with torch.no_grad():
                assert torch.equal(compiled(x), expected)

    in_threads(lambda: [model.generate(ids, **options) for _ in range(2)] and None, ask)
    assert torch.equal(model.generate(ids, **options), written)


def test_threads_that_compete_do_not_read_a_block_for_every_operator(llama: pathlib.Path) -> None:
    """Two threads that alternate at every operator have one slot each."""
    model = streamed(llama)
    streaming = streaming_of(model)
    assert len(streaming.slots) == 2
    blocks, x = len(streaming.blocks), torch.randn(3, 64).bfloat16()
    operators = [
        [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp.gate_proj, layer.mlp.up_proj]
        for layer in model.model.layers
    ]

    def fills_of(passes: int, workers: list[concurrent.futures.Executor]) -> int:
        before = streaming.fills
        for at in range(passes * blocks):
            for j in range(len(operators[0])):
                for i, worker in enumerate(workers):
                    worker.submit(operators[(at + 2 * i) % blocks][j], x).result(TIMEOUT)
        return streaming.fills - before

    with concurrent.futures.ThreadPoolExecutor(1) as first, concurrent.futures.ThreadPoolExecutor(1) as second:
        assert (
            fills_of(4, [first, second]) <= 4 * 2 * blocks + 12
        )  # one block per thread, plus the fills before the second thread was noticed
        fills_of(3, [first])  # the other thread has ended
        assert fills_of(4, [first]) == 4 * blocks
        # Blocks are read ahead again: the next one is in memory.
        assert streaming._resident().keys() == {blocks - 1, 0}


def test_a_pass_that_fails_or_is_abandoned_does_not_block_other_threads(
    llama: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident, model = load(llama).eval(), streamed(llama)
    expected = logits_of(resident, token_ids())

    class GivenUp(Exception):
        pass

    def give_up(*_: Any) -> None:
        raise GivenUp

    hook = model.model.layers[2].mlp.register_forward_hook(give_up)

    def fail() -> None:
        with pytest.raises(GivenUp):
            logits_of(model, token_ids())

    in_threads(fail)
    hook.remove()
    with monkeypatch.context() as patch:
        patch.setattr(FileSource, "read", give_up)
        in_threads(fail, fail)
    loss = model(token_ids()).logits.sum()  # its backward is never called
    in_threads(lambda: torch.testing.assert_close(logits_of(model, token_ids()), expected, rtol=0, atol=0))
    assert loss.isfinite()


def test_a_process_forked_while_a_thread_computes_is_refused_and_does_not_wait(llama: pathlib.Path) -> None:
    model = streamed(llama)
    inside, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        layer = model.model.layers[0].mlp.up_proj
        with streaming_of(model).lend(0, layer, "weight"):
            inside.set()
            go_on.wait(TIMEOUT)

    holder = threading.Thread(target=hold)
    holder.start()
    assert inside.wait(TIMEOUT)

    def ask(connection: Any) -> None:
        try:
            model(token_ids())
        except RuntimeError as error:
            connection.send(str(error))

    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=ask, args=(sender,))
    child.start()
    child.join(TIMEOUT)
    waits = child.is_alive()
    child.kill()
    go_on.set()
    holder.join()
    assert not waits
    assert "forked from the one that streams it" in receiver.recv()
