"""Reinforcement learning with TRL's GRPOTrainer on a 4-bit base: several answers per prompt, scored by a function.

    python examples/grpo_trl.py --model DIR --data prompts.jsonl --output RUN

Each line of the data is {"prompt": ...}. The reward here is the share of lower-case letters; replace it by your own.
Rollouts samples the answers by batched decoding, with the adapter as it is at that step.
"""

import argparse
from typing import Any

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import qlora_ext
from qlora_app.decoding import Rollouts

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a directory or a name on the hub")
parser.add_argument("--data", required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--new-tokens", type=int, default=64, help="per answer")
args = parser.parse_args()


def reward(completions: list[str], **columns: Any) -> list[float]:
    """One number per answer; more is better."""
    return [sum(letter.islower() for letter in answer) / max(len(answer), 1) for answer in completions]


model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=qlora_ext.QLoRAConfig())
trainer = GRPOTrainer(
    model=model,
    reward_funcs=reward,
    args=GRPOConfig(
        output_dir=args.output, max_steps=args.steps, per_device_train_batch_size=4, num_generations=4,
        max_completion_length=args.new_tokens, learning_rate=1e-5, logging_steps=1, report_to="none", bf16=False,
    ),
    train_dataset=load_dataset("json", data_files=args.data, split="train"),
    processing_class=AutoTokenizer.from_pretrained(args.model, padding_side="left"),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    rollout_func=Rollouts(),
)  # fmt: skip
trainer.train()
trainer.save_model(args.output)
