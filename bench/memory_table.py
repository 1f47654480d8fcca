"""Writes the table of docs/memory.md: the planned memory of streamed runs of known models.

    python bench/memory_table.py [--check]

The table is between two marks in that file. `--check` changes nothing, and fails if the table is out of date.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import sys

from qlora_app.planning import families, search
from qlora_app.planning.blocks import streamed
from qlora_app.planning.memory import Job, checkpoint_bytes

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "memory.md"
BEGIN, END = "<!-- by bench/memory_table.py -->\n", "<!-- end of the table -->\n"
MODELS = {
    "llama-7b": "Llama 7B",
    "llama-13b": "Llama 13B",
    "llama-33b": "Llama 33B",
    "llama-65b": "Llama 65B",
    "llama-3-70b": "Llama 3 70B",
    "llama-3.1-405b": "Llama 3.1 405B",
    "mixtral-8x7b": "Mixtral 8x7B",
    "qwen3-30b-a3b": "Qwen3 30B-A3B",
}
TOKENS, CUDA = 2048, 0.5e9
CARDS = (4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 80)
LINK, FLOPS = 25e9, 150e12
HEADINGS = (
    "",
    "4-bit layers",
    "one layer",
    f"on the GPU at {TOKENS:,} tokens",
    "smallest card",
    "pinned RAM",
    "memory for a context of",
    "a forward pass hides its copies from",
)


def row(name: str, title: str) -> str:
    job = Job(
        config=families.config(name),
        seq_len=TOKENS,
        grad_checkpointing=True,
        chunked_loss=True,
        offload_checkpoints=True,
        mlp_chunk=1024,
        stream="ram",
    )
    blocks = streamed(job)
    device = search.total(job, blocks)
    card = next(size for size in CARDS if size * 1e9 - CUDA >= device)
    context = search.longest_context(job, blocks, card * 1e9 - CUDA)
    cells = (
        title,
        f"{blocks.total / 1e9:.1f} GB",
        f"{blocks.largest / 1e9:.2f} GB",
        f"{device / 1e9:.1f} GB",
        f"{card} GB",
        f"{math.ceil((blocks.host_bytes('ram') + checkpoint_bytes(job)) / 1e9)} GB",
        f"{context // 100 * 100:,} tokens",
        f"{blocks.free_tokens(LINK, FLOPS, True)[0]:,} tokens",
    )
    return "| " + " | ".join(cells) + " |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    arguments = parser.parse_args()
    table = "| " + " | ".join(HEADINGS) + " |\n|" + " --- |" * len(HEADINGS) + "\n"
    for name, title in MODELS.items():
        table += row(name, title)
        print(table.splitlines()[-1], flush=True)
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    written = before + BEGIN + "\n" + table + "\n" + END + rest.split(END)[1]
    if arguments.check and written != page:
        sys.exit(f"{PAGE.name}: the planner gives another table; run bench/memory_table.py")
    PAGE.write_text(written)


if __name__ == "__main__":
    main()
