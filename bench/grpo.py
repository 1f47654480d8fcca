"""A step of GRPO on the CPU: sampling the answers, and learning from their rewards.

    python bench/grpo.py [--rounds 3] [--threads 2] [--prompts 2] [--generations 8] [--new-tokens 64]

TRL's GRPOTrainer trains LoRA adapters of rank 16 on all linear layers of SmolLM2-135M-Instruct. The contenders are
qlora_ext, which samples with Rollouts; qlora_ext with TRL's own sampling (transformers' generate); and bitsandbytes'
NF4 with TRL's own sampling. All compute in float32, but the 4-bit layers of qlora_ext multiply in bfloat16 where that
takes less time, as in `qlora-ext finetune`. No answer ends before it has --new-tokens tokens. In each round, every
contender makes one step, after one that is not timed. The first run compiles the decoding, which takes minutes.
"""

from __future__ import annotations

import importlib.util
import pathlib
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import quality
from lib import harness
from qlora_app.decoding import Rollouts
from qlora_app.models import DEFAULT_MODEL, load_tokenizer, resolve
from step import load, load_ours, with_lora

OURS, GENERATE, THEIRS = "qlora_ext", "qlora_ext, generate", "bitsandbytes, generate"


class _Clock(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """The seconds of a step."""

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self._start


def reward(completions: list[str], **columns: Any) -> list[float]:
    return [sum(letter.islower() for letter in text) / max(len(text), 1) for text in completions]


class Contender:
    """A model with an adapter, which TRL trains for one step per call."""

    def __init__(self, model: Any, tokenizer: Any, rollouts: Rollouts | None, options: Any, folder: str) -> None:
        self.model, self.tokenizer, self.rollouts, self.folder = model, tokenizer, rollouts, folder
        self.prompts, self.generations, self.tokens = options.prompts, options.generations, options.new_tokens

    def seconds(self) -> float:
        """The time of one step: sampling, rewards, forward, backward and AdamW."""
        answers = self.prompts * self.generations
        arguments = GRPOConfig(
            output_dir=self.folder, max_steps=1, per_device_train_batch_size=answers, learning_rate=1e-5,
            num_generations=self.generations, max_completion_length=self.tokens, report_to="none", bf16=False,
            save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, use_cpu=True,
            generation_kwargs={"min_new_tokens": self.tokens},
        )  # fmt: skip
        words = ["rivers", "bread", "clouds", "engines", "sleep", "music", "stone", "ink"]
        data = Dataset.from_list([{"prompt": f"Write a few sentences about {word}."} for word in words])
        clock = _Clock()
        trainer = GRPOTrainer(
            self.model, reward, arguments, train_dataset=data, processing_class=self.tokenizer, callbacks=[clock],
            rollout_func=self.rollouts,
        )  # fmt: skip
        trainer.eos_token_ids = []
        trainer.train()
        return clock.seconds


def main() -> None:
    parser = harness.parser(__doc__, seconds=0.0)
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--prompts", type=int, default=2, help="per step (default %(default)s)")
    parser.add_argument("--generations", type=int, default=8, help="answers per prompt (default %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="per answer (default %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source = resolve(DEFAULT_MODEL)
    tokenizer = load_tokenizer(source)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "dense"
        quality.save_dense(source, str(path))
        ours = Rollouts(sequences=options.prompts * options.generations, compiled=True, progress=print)
        built = {
            OURS: (load_ours(str(path), torch.float32), ours),
            GENERATE: (load_ours(str(path), torch.float32), None),
        }
        if importlib.util.find_spec("bitsandbytes"):
            theirs = load(path, torch.float32, quantization_config=quality.nf4_of_bitsandbytes(torch.float32))
            built[THEIRS] = theirs, None
        contenders = {
            name: Contender(with_lora(model, 0.0), tokenizer, rollouts, options, f"{folder}/run")
            for name, (model, rollouts) in built.items()
        }
        times = harness.Times({name: [] for name in contenders})
        for turn in range(options.rounds + 1):
            for name, contender in contenders.items():
                spent = contender.seconds()
                print(f"{'timed' if turn else 'warm-up'}: {name}, {spent:.1f} s", flush=True)
                if turn:
                    times[name].append(spent)
    report = harness.Report(
        f"grpo_{options.threads}_threads",
        "A step of GRPO on the CPU: SmolLM2-135M-Instruct",
        [
            f"{options.prompts} prompts with {options.generations} answers of {options.new_tokens} tokens per step, in",
            "float32; LoRA of rank 16 on all linear layers. qlora_ext multiplies in bfloat16 in 4-bit layers where",
            "that takes less time. Ratio: time over qlora_ext's in the same round, median (10th to 90th percentile).",
        ],
    )
    for name in times:
        report.add(**{
            "contender": name, "seconds per step": times.median(name), "time over qlora_ext's": times.ratio(name, OURS),
        })  # fmt: skip
    report.write()


if __name__ == "__main__":
    main()
