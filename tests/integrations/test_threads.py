"""Several threads in one model: each gets the same result as alone, with every PEFT method."""

from __future__ import annotations

import concurrent.futures
import functools
import threading
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from qlora_ext.nn import quantize_model
from tiny_models import make

THREADS, CALLS = 8, 5
mixtral = functools.partial(make, "mixtral")
TARGETS = ["q_proj", "up_proj"]
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
KINDS: dict[str, tuple[Any, Any]] = {
    "lora": (make, lambda: LoraConfig(target_modules=TARGETS)),
    "experts": (mixtral, lambda: LoraConfig(**EXPERTS)),
    "experts_and_router": (mixtral, lambda: LoraConfig(target_modules="all-linear")),
    "embedding": (make, lambda: LoraConfig(target_modules=["embed_tokens", "q_proj"])),
    "dora": (make, lambda: LoraConfig(target_modules=TARGETS, use_dora=True)),
    "lora_bias": (make, lambda: LoraConfig(target_modules=TARGETS, lora_bias=True)),
    "ia3": (make, lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["up_proj"])),
    "loha": (make, lambda: peft.LoHaConfig(target_modules=TARGETS)),
    "lokr": (make, lambda: peft.LoKrConfig(target_modules=TARGETS)),
    "oft": (make, lambda: peft.OFTConfig(target_modules=TARGETS, oft_block_size=4)),
    "vera": (make, lambda: peft.VeraConfig(target_modules=TARGETS, r=4)),
    "hra": (make, lambda: peft.HRAConfig(target_modules=TARGETS)),
}


def build(kind: str) -> Any:
    base, config = KINDS[kind]
    model = get_peft_model(quantize_model(base(dtype=torch.float32), embeddings=kind == "embedding"), config()).eval()
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, mean=0.1, std=0.1)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_eight_threads_compute_the_same_as_one(kind: str) -> None:
    model = build(kind)
    samples = [torch.randint(3, 128, (1, 4 + i)) for i in range(THREADS)]

    def step(ids: Tensor) -> list[Tensor]:
        logits = model(input_ids=ids, use_cache=False).logits
        return [logits, *torch.autograd.grad(logits.square().sum(), [p for p in model.parameters() if p.requires_grad])]

    expected = [step(ids) for ids in samples]
    start = threading.Barrier(THREADS)

    def run(i: int) -> list[list[Tensor]]:
        start.wait()
        return [step(samples[i]) for _ in range(CALLS)]

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(run, range(THREADS)))
    for found, one in zip(results, expected, strict=True):
        for tensors in found:
            assert all(torch.equal(a, b) for a, b in zip(tensors, one, strict=True))


@pytest.mark.parametrize("kind", ["experts", "dora", "ia3"])
def test_a_forward_leaves_the_modules_as_they_were(kind: str) -> None:
    """Also during a call: a hook in it finds every module in its original place."""
    model = build(kind)
    before = dict(model.named_modules())
    seen: list[bool] = []

    def look(*_: Any) -> None:
        seen.append(all(a is b for a, b in zip(model.modules(), before.values(), strict=True)))

    for module in before.values():
        if hasattr(module, "packed_shapes"):
            module.register_forward_hook(look)
    model(input_ids=torch.arange(3, 9)[None])
    assert seen
    assert all(seen)
    assert [*model.named_modules()] == [*before.items()]


@pytest.mark.parametrize("kind", ["dora", "ia3", "loha", "experts"])
def test_disabling_a_merged_adapter_unmerges_it(kind: str) -> None:
    """This is the behaviour of PEFT's layers."""
    ids = torch.arange(3, 9)[None]
    model = build(kind)
    expected = model.base_model.model
    with torch.no_grad():
        with model.disable_adapter():
            plain = expected(ids).logits
        active = model(ids).logits
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(expected(ids).logits, plain)
        assert torch.equal(model(ids).logits, active)
