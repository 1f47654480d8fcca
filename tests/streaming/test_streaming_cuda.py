"""On CUDA, streamed weights pass through a small ring by asynchronous copies that overlap with the computation."""

from __future__ import annotations

import gc
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import qlora_ext
from qlora_ext.nn import Experts4bit
from qlora_ext.streaming import offload_checkpoints, stream, streaming_of
from streamed_models import LAYERS, adapted, assert_same, checkpointed, load, save, trained
from tiny_models import token_ids

pytestmark = pytest.mark.cuda


def resident(path: pathlib.Path) -> Any:
    return load(path).to("cuda")


@pytest.mark.parametrize("source", ["ram", "disk"])
@pytest.mark.parametrize("checkpointing", [None, False], ids=["plain", "checkpointed"])
def test_training_is_bit_equal(llama: pathlib.Path, source: str, checkpointing: bool | None) -> None:
    runs = []
    for streamed in (True, False):
        model = stream(load(llama), source=source, device="cuda") if streamed else resident(llama)
        model = adapted(model)
        if checkpointing is not None:
            checkpointed(model, checkpointing)
        runs.append(trained(model, steps=2, device="cuda"))
    assert_same(*runs)


def test_experts_are_bit_equal(tmp_path: pathlib.Path) -> None:
    path = save("Mixtral", tmp_path)
    name = next(n for n, m in load(path).named_modules() if isinstance(m, Experts4bit))
    targets = [f"{'.'.join(name.split('.')[-2:])}.{w}" for w in ("gate_up_proj", "down_proj")]
    options: Any = {"target_modules": ["q_proj"], "target_parameters": targets}
    model, one = stream(load(path), source="ram", device="cuda"), token_ids()[:1, :1].cuda()
    with torch.no_grad():
        assert torch.equal(model(one).logits, resident(path)(one).logits)  # some experts are copied alone
    streamed = trained(adapted(model, **options), 2, "cuda")
    assert_same(streamed, trained(adapted(resident(path), **options), 2, "cuda"))


def test_a_model_on_the_device_moves_out_of_it(llama: pathlib.Path) -> None:
    model = resident(llama)
    with torch.no_grad():
        expected = model(token_ids().cuda()).logits
    before = torch.cuda.memory_allocated()
    stream(model, source="ram")
    streaming = streaming_of(model)
    assert before - torch.cuda.memory_allocated() == packed_bytes(streaming) - streaming.ring_bytes
    assert model.model.layers[0].mlp.up_proj.weight.is_pinned()
    assert torch.equal(model(token_ids().cuda()).logits, expected)


def packed_bytes(streaming: Any) -> int:
    return sum(part.nbytes for block in streaming.blocks for part in block.parts)


def peak_of_a_step(model: Any) -> int:
    trained(model, steps=1, device="cuda")  # one-time allocations are done
    torch.cuda.reset_peak_memory_stats()
    trained(model, steps=1, device="cuda")
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("source", ["ram", "disk"])
def test_the_peak_is_lower_by_the_weights_outside_the_ring(llama: pathlib.Path, source: str) -> None:
    gc.collect()
    start = torch.cuda.memory_allocated()
    model = adapted(stream(load(llama), source=source, device="cuda"))
    streaming = streaming_of(model)
    assert len(streaming.slots) == 2
    saved, ring = packed_bytes(streaming), streaming.ring_bytes
    streamed = peak_of_a_step(model) - start
    del model, streaming
    gc.collect()
    start = torch.cuda.memory_allocated()
    complete = peak_of_a_step(adapted(resident(llama))) - start
    assert streamed == pytest.approx(complete - saved + ring, rel=0.01)


def test_the_ring_is_as_large_as_allowed(llama: pathlib.Path) -> None:
    least = streaming_of(stream(load(llama), source="ram", device="cuda"))
    rest = sum(p.nbytes for p in load(llama).parameters()) - packed_bytes(least)
    for blocks in (2, 3, 4):
        model = stream(load(llama), resident=rest + blocks * least.ring_bytes // 2 + 4096, source="ram", device="cuda")
        assert len(streaming_of(model).slots) == blocks
    everything = streaming_of(stream(load(llama), resident="1GB", source="ram", device="cuda"))
    assert len(everything.slots) == len(everything.blocks)


class Copies(TorchDispatchMode):
    """Records copies between host and device with their stream, and reads of a value by the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in (*args, out) if isinstance(t, torch.Tensor)}
        if devices == {"cpu", "cuda"} or func is torch.ops.aten._local_scalar_dense.default:
            self.found.append((str(func), torch.cuda.current_stream()))
        return out


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def waits(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the host waits for the device")

    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "synchronize", waits)
        patched.setattr(torch.cuda.Stream, "synchronize", waits)
        patched.setattr(torch.cuda.Event, "synchronize", waits)
        yield


@pytest.mark.usefixtures("no_waiting")
def test_the_host_waits_for_nothing_and_the_compute_stream_copies_nothing(llama: pathlib.Path) -> None:
    model = adapted(stream(load(llama), source="ram", device="cuda"))
    ids = token_ids().cuda()
    compute = torch.cuda.current_stream()
    with Copies() as copies:
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
    assert len(copies.found) == streaming_of(model).fills
    assert {name for name, _ in copies.found} == {"aten.copy_.default"}
    assert compute not in {stream for _, stream in copies.found}


def test_a_block_is_overwritten_only_when_it_is_done_with(llama: pathlib.Path) -> None:
    """The copy into a slot waits for an event of the compute stream, and the computation for one of the copy stream."""
    model = stream(load(llama), source="ram", device="cuda")
    streaming = streaming_of(model)
    filler = streaming._filler
    order: list[tuple[str, int]] = []
    fill, retire = filler.fill, filler.retire
    filler.fill = lambda slot, block, size: (order.append(("fill", id(slot))), fill(slot, block, size))
    filler.retire = lambda slot: (order.append(("retire", id(slot))), retire(slot))
    model(token_ids().cuda())
    seen: dict[int, str] = {}
    for what, slot in order:
        assert not (what == "fill" and seen.get(slot) == "fill")  # every copied block was used and retired
        seen[slot] = what
    assert all(slot.done for slot in streaming.slots)


def test_a_streamed_model_cannot_be_captured(llama: pathlib.Path) -> None:
    layer = stream(load(llama), source="ram", device="cuda").model.layers[0].self_attn.q_proj
    x = torch.randn(2, 64, device="cuda", dtype=torch.bfloat16)
    layer(x)
    with pytest.raises(RuntimeError, match="cannot be captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        layer(x)


def test_generation_evaluation_and_merging_in_between(llama: pathlib.Path) -> None:
    def run(model: Any) -> list[Any]:
        model, ids = adapted(model, dropout=0.0).eval(), token_ids().cuda()
        found = [model.generate(input_ids=ids, max_new_tokens=2, do_sample=False)]
        model.merge_adapter()
        with torch.inference_mode():
            found.append(model(input_ids=ids).logits.clone())
        model.unmerge_adapter()
        with torch.no_grad():
            found.append(model(input_ids=ids).logits)
        return found

    pairs = zip(run(stream(load(llama), source="ram", device="cuda")), run(resident(llama)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_fingerprint_is_that_of_a_resident_model(llama: pathlib.Path) -> None:
    fingerprint = qlora_ext.fingerprint.fingerprint
    assert fingerprint(stream(load(llama), source="disk", device="cuda")) == fingerprint(load(llama))


def test_inputs_of_checkpointed_layers_on_the_host(llama: pathlib.Path) -> None:
    ids = torch.randint(3, 128, (4, 64), generator=torch.Generator().manual_seed(1)).cuda()

    def run(offloaded: bool, reentrant: bool) -> tuple[float, dict[str, Any], int]:
        gc.collect()
        model = adapted(resident(llama))
        checkpointed(model, reentrant)
        if offloaded:
            assert offload_checkpoints(model) is model
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        torch.manual_seed(1)
        loss = model.get_base_model().model(input_ids=ids).last_hidden_state.float().square().mean()
        allocated = torch.cuda.memory_allocated() - start
        loss.backward()
        return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, allocated

    hidden = ids.numel() * 64 * 2
    for reentrant in (False, True):
        loss, gradients, allocated = run(True, reentrant)
        expected, others, all_allocated = run(False, reentrant)
        assert loss == expected
        assert gradients.keys() == others.keys()
        assert all(torch.equal(g, others[name]) for name, g in gradients.items())
        assert all_allocated - allocated >= (LAYERS - 1) * hidden


def test_without_checkpointing_there_is_nothing_to_keep(llama: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="expected one with gradient checkpointing"):
        offload_checkpoints(load(llama))
