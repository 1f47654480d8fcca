"""Decoding of batches on the CPU: tokens per second of all sequences together.

    python bench/decoding_batch.py [--model smollm2|1b] [--seconds 60] [--threads 2] [--sequences 1,8,16,32]
                                   [--adapters 16] [--prompt 64]

The models are those of bench/decode.py: random weights in the shapes of SmolLM2-135M or Llama-3.2-1B, bf16 compute,
unmerged LoRAs of rank 16, and a bf16 output head. `BatchDecoder` takes greedy steps with compiled code. All sequences
use one adapter, except in a batch of as many sequences as there are adapters, which is also decoded with an adapter per
sequence. The first run of a model compiles it, which takes minutes.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

import qlora_ext
from decode import MODELS, now
from lib import harness
from qlora_app.decoding import BatchDecoder, Sampling, prepare_to_answer
from step import RANK

STEPS = 4  # timed in each round, after one that is not


def step_seconds(engine: BatchDecoder, adapters: list[str | None], prompt: int) -> float:
    """Seconds of a step of a sequence per adapter, after prompts of ``prompt`` tokens."""
    options = Sampling(temperature=0, stop_tokens=(), max_new_tokens=STEPS + 2)
    for i, adapter in enumerate(adapters):
        engine.submit([(i + j) % 1000 for j in range(prompt)], options, adapter)
    engine.step()  # reads the prompts
    engine.step()
    start = now()
    for _ in range(STEPS):
        engine.step()
    assert engine.running == 0
    return (now() - start) / STEPS


def make(name: str, adapters: int) -> Any:
    config = LlamaConfig(**MODELS[name], bos_token_id=None, eos_token_id=None)
    model = qlora_ext.quantize_model(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, "adapter_0")
    for i in range(1, adapters):
        model.add_adapter(f"adapter_{i}", lora)
    return prepare_to_answer(model)


def main() -> None:
    parser = harness.parser(__doc__, seconds=60.0)
    parser.add_argument("--model", choices=MODELS, default="smollm2", help="default smollm2")
    parser.add_argument("--sequences", default="1,8,16,32", help="numbers of sequences (default 1,8,16,32)")
    parser.add_argument("--adapters", type=int, default=16, help="default 16")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt (default 64)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    harness.keep_freed_memory()
    torch.manual_seed(0)
    model = make(arguments.model, arguments.adapters)
    counts = sorted({int(count) for count in arguments.sequences.split(",")} | {arguments.adapters})
    batches: dict[tuple[int, int], list[str | None]] = {(count, 1): [None] * count for count in counts}
    if arguments.adapters > 1:
        batches[arguments.adapters, arguments.adapters] = list(model.peft_config)
    engine = BatchDecoder(model, max(counts), arguments.prompt + STEPS + 2, compiled=True, progress=print)
    times = harness.Times({str(batch): [] for batch in batches})
    order = list(batches)
    end = time.perf_counter() + arguments.seconds
    while time.perf_counter() < end or len(times[str(order[0])]) < 3:
        order.reverse()
        for batch in order:
            times[str(batch)].append(step_seconds(engine, batches[batch], arguments.prompt))
    report = harness.Report(
        f"decoding_batch_{arguments.model}_{arguments.threads}_threads",
        "Decoding batches with adapters on the CPU",
        [
            f"{arguments.model}'s shapes, rank {RANK} on all linears, bf16; prompts of {arguments.prompt} tokens.",
            "Ratio: tokens per second over those of the fewest sequences in the same round, median.",
            "Time: of a step, in units of that of as many sequences with one adapter for all.",
        ],
    )
    fewest = min(counts)
    for count, adapters in sorted(batches):
        key = str((count, adapters))
        report.add(
            **{
                "sequences": count,
                "adapters": adapters,
                "ms per step": 1e3 * times.median(key),
                "tokens/s": count / times.median(key),
                "best": count / times.best(key),
                "tokens/s, ratio": count / fewest / times.ratio(key, str((fewest, 1))).median,
                "time": times.ratio(key, str((count, 1))),
            }
        )
    report.write()


if __name__ == "__main__":
    main()
