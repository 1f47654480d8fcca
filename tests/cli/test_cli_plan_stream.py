"""The planner with streaming is compared with streamed models and with its formula; and its automatic choices."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import qlora_ext
from commands import here
from qlora_app.planning import families
from qlora_app.planning.blocks import streamed
from qlora_app.planning.memory import Job, split
from qlora_ext.streaming.blocks import blocks_of

SIZES = "hidden=128,intermediate=384,layers=10,heads=4,kv-heads=2,vocab=512"


def plan_of(*options: str, sizes: str = SIZES) -> Any:
    return json.loads(here("plan", "--sizes", sizes, "--seq-len", "64", "--json", *options))


def few_layers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``plan_of`` for models of few layers. The search for options runs a step of the model per choice."""
    monkeypatch.setattr(families, "names", lambda: ["smollm2-135m"])
    monkeypatch.setitem(families._FAMILIES, "smollm2-135m", ("llama", 49152, 576, 1536, 2, 9, 3, True))
    return functools.partial(plan_of, sizes=SIZES.replace("layers=10", "layers=3"))


def test_blocks_are_those_of_the_model() -> None:
    config = families.config_of_sizes(SIZES)
    with torch.device("meta"):
        model = qlora_ext.quantize_model(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    blocks = blocks_of(model)
    found = streamed(Job(config=config))
    assert found.blocks == len(blocks) == 10
    assert found.total == sum(block.nbytes for block in blocks)
    assert found.largest == blocks[0].nbytes
    weights = sum(m.in_features * m.out_features for m in blocks[0].modules)
    assert found.active == weights


def test_planned_memory_of_streaming() -> None:
    resident = plan_of()
    assert "streaming" not in resident
    found = plan_of("--stream", "ram", "--grad-checkpointing", "--link", "10GB/s", "--flops", "50e12")
    s, blocks = found["streaming"], streamed(Job(config=families.config_of_sizes(SIZES)))
    assert s["slots"] == 2
    assert found["bytes"]["ring"] == 2 * blocks.largest
    assert found["bytes"]["base weights"] + found["bytes"]["scales"] == 0
    assert s["host_bytes"] == blocks.total
    assert s["step_bytes"] == 2 * 8 * blocks.largest
    seconds, operations = blocks.largest / 10e9, 2 * blocks.active / 50e12
    assert s["free_tokens"] == pytest.approx(seconds / operations, abs=1)
    assert s["free_tokens_of_the_step"] == pytest.approx(2 * seconds / (3 * operations), abs=1)
    from_disk = plan_of("--stream", "disk", "--resident", "1GB")["streaming"]
    assert from_disk["slots"] == 10
    assert from_disk["step_bytes"] == 0
    assert from_disk["host_bytes"] == 2 * blocks.largest


def test_long_contexts() -> None:
    options = ("--grad-checkpointing", "--chunked-loss", "--batch-size", "4")
    plain = plan_of(*options)["bytes"]
    offloaded = plan_of(*options, "--offload-checkpoints")
    assert offloaded["total"] <= sum(plain.values())
    job = Job(config=families.config_of_sizes(SIZES), seq_len=64, batch_size=4, grad_checkpointing=True)
    one = 4 * 64 * 128 * 2
    at_the_turn, near_the_end = {"activations": 12 * one, "adapters": 0}, {"activations": one, "adapters": 0}
    job = dataclasses.replace(job, offload_checkpoints=True)
    assert split(job, [at_the_turn])["activations"] == 4 * one  # eight of ten inputs are offloaded
    assert split(job, [near_the_end])["activations"] == one
    chunked = plan_of(*options, "--mlp-chunk", "8")
    assert chunked["total"] < sum(plain.values())


def test_choices_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = few_layers(monkeypatch)
    everything = plan("--max-memory", "10GB")
    assert everything["options"] == "no option"
    assert everything["largest_model"] == "smollm2-135m"
    nothing = plan("--max-memory", "1MB")
    assert not nothing["fits"]
    assert nothing["longest_context"] == 0
    size = plan("--chunked-loss", "--grad-checkpointing")["total"]
    some = plan("--max-memory", str(int(size * 1.01)))
    assert some["fits"]
    assert some["total"] <= size * 1.01
    assert "--grad-checkpointing" in some["options"]
    at_most = plan("--max-memory", "200MB")["longest_context"]
    fitting = plan("--seq-len", str(at_most), "--memory", "200MB")
    assert fitting["fits"]
    assert fitting["total"] > 0.9 * 200e6


@pytest.mark.usefixtures("native_bfloat16")
def test_a_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = few_layers(monkeypatch)
    card, host = plan("--grad-checkpointing"), plan("--grad-checkpointing", "--device", "cpu")
    parts = host["bytes"]
    assert parts.keys() - card["bytes"].keys() == {"malloc", "process"}
    assert parts["malloc"] == pytest.approx(0.7 * parts["workspace"])
    assert 0.4e9 < parts["process"] < 2e9  # Python, torch, transformers and PEFT
    assert host["total"] == pytest.approx(card["total"] + parts["malloc"] + parts["process"])
    narrow = plan("--device", "cpu", "--max-memory", str(int(parts["process"] + 8e6)))
    assert "--offload-checkpoints" not in narrow["options"]
    assert "--stream ram" not in narrow["options"]
    assert plan("--device", "cpu", "--max-memory", "300MB")["fits"] is False
