"""Decoding of batches on the CPU: tokens per second of all sequences together.

    python bench/decoding_batch.py [--model smollm2|1b] [--seconds 60] [--threads 2] [--sequences 1,8,32] [--prompt 64]

The models are those of bench/decode.py: random weights in the shapes of SmolLM2-135M or Llama-3.2-1B, bf16 compute, an
unmerged LoRA of rank 16, and a bf16 output head. `BatchDecoder` takes greedy steps with compiled code.
"""

from __future__ import annotations

import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

import qlora_ext
from decode import MODELS, now
from lib import harness
from qlora_ext.decoding import BatchDecoder, Sampling, prepare_to_answer
from step import RANK

STEPS = 4  # timed in each round, after one that is not


def step_seconds(engine: BatchDecoder, sequences: int, prompt: int) -> float:
    """Seconds of a step with that many sequences, after prompts of ``prompt`` tokens."""
    options = Sampling(temperature=0, stop_tokens=(), max_new_tokens=STEPS + 2)
    for i in range(sequences):
        engine.submit([(i + j) % 1000 for j in range(prompt)], options)
    engine.step()  # reads the prompts
    engine.step()
    start = now()
    for _ in range(STEPS):
        engine.step()
    assert engine.running == 0
    return (now() - start) / STEPS


def main() -> None:
    parser = harness.parser(__doc__, seconds=60.0)
    parser.add_argument("--model", choices=MODELS, default="smollm2", help="default smollm2")
    parser.add_argument("--sequences", default="1,8,32", help="numbers of sequences (default 1,8,32)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt (default 64)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    harness.keep_freed_memory()
    torch.manual_seed(0)
    config = LlamaConfig(**MODELS[arguments.model], bos_token_id=None, eos_token_id=None)
    model = qlora_ext.quantize_model(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = prepare_to_answer(get_peft_model(model, lora))
    counts = [int(count) for count in arguments.sequences.split(",")]
    engine = BatchDecoder(model, max(counts), arguments.prompt + STEPS + 2, compiled=True, progress=print)
    times = harness.Times({str(count): [] for count in counts})
    end = time.perf_counter() + arguments.seconds
    while time.perf_counter() < end or len(times[str(counts[0])]) < 3:
        counts.reverse()
        for count in counts:
            times[str(count)].append(step_seconds(engine, count, arguments.prompt))
    report = harness.Report(
        f"decoding_batch_{arguments.model}_{arguments.threads}_threads",
        "Decoding batches with an adapter on the CPU",
        [
            f"{arguments.model}'s shapes, rank {RANK} on all linears, bf16; prompts of {arguments.prompt} tokens.",
            "Ratio: tokens per second over those of the fewest sequences in the same round, median.",
        ],
    )
    fewest = min(counts)
    for count in sorted(counts):
        report.add(
            **{
                "sequences": count,
                "ms per step": 1e3 * times.median(str(count)),
                "tokens/s": count / times.median(str(count)),
                "best": count / times.best(str(count)),
                "tokens/s, ratio": count / fewest / times.ratio(str(count), str(fewest)).median,
            }
        )
    report.write()


if __name__ == "__main__":
    main()
