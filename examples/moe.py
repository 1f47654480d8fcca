"""Trains a mixture of experts: all experts in 4 bits, with LoRA and dropout on attention and experts.

python examples/moe.py --model DIR --text FILE.txt --output ADAPTER
"""

import argparse
import pathlib

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_ext

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="allenai/OLMoE-1B-7B-0924", help="a directory or a name on the hub")
parser.add_argument("--text", required=True, type=pathlib.Path)
parser.add_argument("--output", required=True)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--length", type=int, default=256, help="tokens per row")
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=qlora_ext.QLoRAConfig())
print(qlora_ext.nn.coverage(model))  # experts are 4-bit, routers stay dense

# PEFT adapts experts by the names of their weights.
experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=attention, target_parameters=experts)
model = get_peft_model(model, lora)
model.print_trainable_parameters()

ids = AutoTokenizer.from_pretrained(args.model)(args.text.read_text(), return_tensors="pt").input_ids[0]
rows = ids[: len(ids) // args.length * args.length].reshape(-1, args.length)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
for step in range(args.steps):
    row = rows[step % len(rows)][None]
    loss = model(input_ids=row, labels=row).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}/{args.steps}  loss {loss.item():.3f}")
model.save_pretrained(args.output)
