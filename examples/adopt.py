"""Converts a model that bitsandbytes has loaded, in place: same weights, same memory, fused kernels.

    python examples/adopt.py --model DIR --prompt "Once upon a time"

To convert a whole program without editing it: `qlora-ext run -- python train.py`.
"""

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import qlora_ext

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a directory or a name on the hub")
parser.add_argument("--prompt", default="Once upon a time")
args = parser.parse_args()

config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=config)
print(qlora_ext.adopt(model))  # before the first forward, which on some CPUs rounds bitsandbytes' scales

ids = AutoTokenizer.from_pretrained(args.model)(args.prompt, return_tensors="pt").input_ids
start = time.perf_counter()
with torch.no_grad():
    logits = model(input_ids=ids).logits
print(f"{ids.shape[1]} tokens in {time.perf_counter() - start:.3f} s, next token {logits[0, -1].argmax().item()}")

# A layer is still what code for bitsandbytes expects, and has the fused kernels' methods, too.
name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, qlora_ext.nn.Linear4bit))
print(f"{name}: {type(layer).__mro__[0].__name__}, weight {layer.dequantize().shape}")
