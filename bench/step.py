"""A whole QLoRA training step of a SmolLM2-135M on the CPU, against what a user has today.

    python bench/step.py [--seconds 120] [--threads 2] [--tokens 4x256] [--layers 30]

The model has SmolLM2-135M's configuration and random weights, bf16 compute, LoRA of rank 16 on all linear layers from
PEFT's `get_peft_model`, AdamW on the adapters. The contenders differ in the base: NF4 with double quantization from
qlora_ext, the same from bitsandbytes, and the dense bf16 weights (LoRA without quantization). A step is forward,
backward and optimizer; contenders run interleaved in one process.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile

import harness
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

import qlora_ext

SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
RANK = 16


class Step:
    """One contender: a call is a training step on the next batch."""

    def __init__(self, path: str, batches: harness.Ring[torch.Tensor], **kwargs: object) -> None:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **kwargs)
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(model, config).train()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=2e-4)
        self.batches = batches

    def __call__(self, turn: int) -> torch.Tensor:
        ids = self.batches.at(turn)
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="time in all (default 120)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's")
    parser.add_argument("--tokens", default="4x256", help="batch x sequence length (default 4x256)")
    parser.add_argument("--layers", type=int, default=30, help="default 30, as SmolLM2-135M has")
    arguments = parser.parse_args()
    batch, length = (int(part) for part in arguments.tokens.split("x"))
    torch.set_num_threads(arguments.threads)
    harness.keep_freed_memory()
    torch.manual_seed(0)
    batches = harness.Ring(torch.randint(0, SMOLLM2_135M["vocab_size"], (batch, length)) for _ in range(4))

    double_quant = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    with tempfile.TemporaryDirectory() as path:
        config = LlamaConfig(**SMOLLM2_135M, num_hidden_layers=arguments.layers)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
        steps = {"qlora_ext": Step(path, batches, quantization_config=qlora_ext.QLoRAConfig())}
        if importlib.util.find_spec("bitsandbytes"):
            bnb = BitsAndBytesConfig(**double_quant, bnb_4bit_compute_dtype=torch.bfloat16)
            steps["bitsandbytes"] = Step(path, batches, quantization_config=bnb)
        steps["dense LoRA"] = Step(path, batches)

    for name, step in steps.items():  # the adapters start as no change, so these are the base models' losses
        losses = step(0), steps["dense LoRA"](0)
        harness.check_equal(losses[0], losses[1], name, 2e-2)
    times = harness.interleave(steps, seconds=arguments.seconds)
    report = harness.Report(
        f"step_{arguments.threads}_threads",
        "A QLoRA training step on the CPU",
        [
            f"SmolLM2-135M's shapes, {arguments.layers} layers, {batch} x {length} tokens, rank {RANK} on all linears,",
            "bf16. Ratio: time over that of qlora_ext in the same round, median (10th to 90th percentile).",
        ],
    )
    for name in steps:
        report.add(
            base=name,
            **{
                "tokens/s": batch * length / times.median(name),
                "time over qlora_ext's": times.ratio(name, "qlora_ext"),
            },
        )
    report.write()


if __name__ == "__main__":
    main()
