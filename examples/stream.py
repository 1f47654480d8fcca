"""Trains a model whose 4-bit layers stay on disk: each decoder layer is read just before it is used.

    python examples/stream.py --model DIR --text FILE.txt --output ADAPTER

The losses have the same bits as those of a model that is in memory.
"""

import argparse
import pathlib

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_ext

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a directory or a name on the hub")
parser.add_argument("--text", required=True, type=pathlib.Path)
parser.add_argument("--output", required=True, type=pathlib.Path)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--length", type=int, default=256, help="tokens per row")
args = parser.parse_args()

# Streaming from disk reads a model that was saved in 4 bits. `qlora-ext quantize` writes one weight at a time.
base = args.output / "base"
config = qlora_ext.QLoRAConfig()
AutoModelForCausalLM.from_pretrained(args.model, quantization_config=config).save_pretrained(base)

streamed = qlora_ext.QLoRAConfig(stream="disk")
model = AutoModelForCausalLM.from_pretrained(base, quantization_config=streamed)
streaming = qlora_ext.streaming.streaming_of(model)
assert streaming is not None
print(f"{len(streaming.blocks)} blocks on disk")
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
model.enable_input_require_grads()

ids = AutoTokenizer.from_pretrained(args.model)(args.text.read_text(), return_tensors="pt").input_ids[0]
rows = ids[: len(ids) // args.length * args.length].reshape(-1, args.length)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
model.train()
for step in range(args.steps):
    row = rows[step % len(rows)][None]
    loss = model(input_ids=row, labels=row).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}/{args.steps}  loss {loss.item():.3f}")
model.save_pretrained(args.output / "adapter")
