"""Fine-tunes a model with transformers' Trainer: 4-bit base, LoRA on all linear layers.

    python examples/finetune.py --model DIR --data pairs.jsonl --output RUN

Each line of the data is {"prompt": ..., "completion": ...}; the completion is learnt.
"""

import argparse
import json
import pathlib

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import qlora_ext

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a directory or a name on the hub")
parser.add_argument("--data", required=True, type=pathlib.Path)
parser.add_argument("--output", required=True)
parser.add_argument("--steps", type=int, default=100)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=qlora_ext.QLoRAConfig())
lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(model, lora)
model.print_trainable_parameters()


def encoded(row: dict[str, str]) -> dict[str, list[int]]:
    prompt = tokenizer(f"{row['prompt']}\n").input_ids
    answer = tokenizer(row["completion"] + tokenizer.eos_token, add_special_tokens=False).input_ids
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=args.output, max_steps=args.steps, per_device_train_batch_size=4, learning_rate=2e-4,
        lr_scheduler_type="constant_with_warmup", warmup_steps=3, max_grad_norm=0.3, logging_steps=1, report_to="none",
    ),
    train_dataset=[encoded(json.loads(line)) for line in args.data.read_text().splitlines()],
    data_collator=DataCollatorForSeq2Seq(tokenizer),
)  # fmt: skip
trainer.train()
model.save_pretrained(args.output)
