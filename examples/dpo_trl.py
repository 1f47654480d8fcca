"""Learns preferences with TRL's DPOTrainer; the 4-bit base without its adapter is the reference.

    python examples/dpo_trl.py --model DIR --data preferences.jsonl --output RUN

Each line of the data is {"prompt": ..., "chosen": ..., "rejected": ...}.
"""

import argparse

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import qlora_ext

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a directory or a name on the hub")
parser.add_argument("--data", required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--steps", type=int, default=100)
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=qlora_ext.QLoRAConfig())
trainer = DPOTrainer(
    model=model,  # no ref_model: TRL switches the adapter off instead, so the base is in memory only once
    args=DPOConfig(
        output_dir=args.output, max_steps=args.steps, per_device_train_batch_size=2, learning_rate=5e-5, beta=0.1,
        max_length=256, logging_steps=1, report_to="none", bf16=False,
    ),
    train_dataset=load_dataset("json", data_files=args.data, split="train"),
    processing_class=AutoTokenizer.from_pretrained(args.model),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
)  # fmt: skip
trainer.train()
trainer.save_model(args.output)
