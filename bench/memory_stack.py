"""The planned memory of QLoRA runs by model size: plain, with checkpointing, and streamed.

    python bench/memory_stack.py

Computed, not measured, for a GPU. Writes results/planner.json, from which bench/lib/pictures.py draws.
"""

from __future__ import annotations

from lib import results_files as files
from qlora_app.planning import families
from qlora_app.planning.blocks import place, streamed
from qlora_app.planning.memory import Job, peaks, split

MODELS = {"llama-7b": "7B", "llama-13b": "13B", "llama-33b": "33B", "llama-65b": "65B"}
TOKENS = 2048
PARTS = {
    "4-bit weights": ("base weights", "scales", "ring"),
    "embeddings and head": ("other weights",),
    "adapters": ("adapters",),
    "optimizer and gradients": ("optimizer state", "gradients"),
    "activations": ("activations", "workspace", "logits"),
}


def row(name: str, title: str, stream: bool) -> files.Row:
    options = {"grad_checkpointing": True, "chunked_loss": True}
    job = Job(config=families.config(name), seq_len=TOKENS, stream="ram" if stream else "none", **options)
    parts = split(job, peaks(job))
    if stream:
        parts, _ = place(parts, streamed(job), None)
    sizes = {part: sum(parts.get(key, 0.0) for key in keys) / 1e9 for part, keys in PARTS.items()}
    return {"model": title, "how": "streamed" if stream else "resident", **sizes}


def main() -> None:
    rows = [row(name, title, stream) for name, title in MODELS.items() for stream in (False, True)]
    title = f"Memory of a QLoRA run by the planner, rank 16, {TOKENS} tokens, checkpointing, chunked loss"
    section = {"title": title, "notes": ["Gigabytes."], "machine": {}, "rows": rows}
    files.write_section(files.RESULTS / f"{files.PLANNER}.json", "memory_stack", section)
    print("\n".join(files.table(rows)))


if __name__ == "__main__":
    main()
