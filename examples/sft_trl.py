"""Supervised fine-tuning with TRL's SFTTrainer on a 4-bit base.

    python examples/sft_trl.py --model DIR --data pairs.jsonl --output RUN

Each line of the data is {"prompt": ..., "completion": ...}, {"text": ...} or {"messages": [...]}, as TRL reads them.
"""

import argparse

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import qlora_ext

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a directory or a name on the hub")
parser.add_argument("--data", required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--steps", type=int, default=100)
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=qlora_ext.QLoRAConfig())
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=args.output, max_steps=args.steps, per_device_train_batch_size=4, learning_rate=2e-4,
        max_length=256, logging_steps=1, report_to="none", bf16=False,
    ),
    train_dataset=load_dataset("json", data_files=args.data, split="train"),
    processing_class=AutoTokenizer.from_pretrained(args.model),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
)  # fmt: skip
trainer.train()
trainer.save_model(args.output)
