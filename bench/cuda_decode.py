"""Decoding with an adapter on a GPU: tokens per second, eager and as a CUDA graph, beside bitsandbytes and bf16.

    python bench/cuda_decode.py [--minutes 1] [--tiny] [--device cuda|cpu]

The model is that of `bench/cuda_step.py llama`. One sequence, with transformers' static cache; a graph holds the whole
step, from one token to the next. Its tokens must be those of the eager model. Writes a section of
bench/results/CARD.json. Under the kernel simulator graphs are captured and replayed, and nothing is timed or written;
on the CPU only the eager model runs.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import StaticCache

from lib.cuda_models import RANK, adapted, contenders
from lib.cuda_timing import NOT_MEASURED, SIMULATED, Failures, captured, card_name
from lib.harness import Report, cuda_clock, interleave
from lib.nvidia_smi import Clocks

LENGTH, TINY_LENGTH = 512, 16  # of the cache
CHECKED = 8  # tokens that are compared


class Decoder:
    """A model with a cache and a current token. A call to `step` replaces the token by the next one."""

    def __init__(self, contender: str, tiny: bool, device: str) -> None:
        self.model = adapted(contender, "llama", tiny, device).eval().requires_grad_(False)
        self.length = TINY_LENGTH if tiny else LENGTH
        self.cache = StaticCache(config=self.model.config, max_cache_len=self.length)
        self.token = torch.zeros(1, 1, dtype=torch.long, device=device)
        forward = inspect.signature(self.model.base_model.model.forward).parameters
        self.name = "cache" if "cache" in forward else "past_key_values"  # transformers has renamed it

    @torch.no_grad()
    def step(self, _: int = 0) -> torch.Tensor:
        logits = self.model(input_ids=self.token, use_cache=True, **{self.name: self.cache}).logits
        return self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))

    def tokens(self, step: Callable[[int], Any]) -> list[int]:
        """The tokens that follow the first, the first two and so on of a prompt."""
        self.cache.reset()
        prompt = torch.randint(0, self.model.config.vocab_size, (CHECKED,), generator=torch.Generator().manual_seed(0))
        found = []
        for turn, token in enumerate(prompt.tolist()):
            self.token.fill_(token)
            step(turn)
            found.append(int(self.token))
        self.cache.reset()
        return found


def rates(decoder: Decoder, calls: dict[str, Callable[[int], Any]], seconds: float) -> dict[str, Any]:
    """Tokens per second of each call, and the time of the others over that of the graph."""

    def bounded(step: Callable[[int], Any]) -> Callable[[int], Any]:
        def call(turn: int) -> None:
            if turn % (decoder.length // 2) == 0:
                decoder.cache.reset()
            step(turn)

        return call

    times = interleave({name: bounded(step) for name, step in calls.items()}, seconds=seconds, clock=cuda_clock)
    return {f"tokens/s, {name}": 1 / times.median(name) for name in calls}


def measure(contender: str, tiny: bool, device: str, seconds: float) -> dict[str, Any]:
    """A row of the table. Raises AssertionError if the graph does not write the eager model's tokens."""
    decoder = Decoder(contender, tiny, device)
    calls: dict[str, Callable[[int], Any]] = {"eager": decoder.step}
    first = decoder.tokens(decoder.step)
    if device == "cuda":
        calls["CUDA graph"] = captured(decoder.step, 1)
        replayed = decoder.tokens(calls["CUDA graph"])
        if replayed != first:
            raise AssertionError(f"the graph writes {replayed}, the eager model {first}")
    row = {"tokens": " ".join(map(str, first))}
    if device == "cpu" or SIMULATED:
        return {**row, **{f"tokens/s, {way}": NOT_MEASURED for way in calls}}
    clocks = Clocks()
    return {**row, **rates(decoder, calls, seconds), **clocks.row()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model: does it work at all")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to test this program")
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    if cuda and not torch.cuda.is_available():
        sys.exit("no CUDA device: bench/decode.py times the CPU")
    notes = [f"LoRA of rank {RANK}, not merged.", *__doc__.split("\n\n")[2].splitlines()]
    report = Report("cuda_decode", f"Decoding on {card_name() if cuda else 'the CPU'}", notes)
    names = contenders("llama")
    seconds = 0.5 * arguments.minutes * 60 / len(names)
    failures = Failures()
    for name in names:
        with failures.caught(name):
            report.add(base=name, **measure(name, arguments.tiny, arguments.device, seconds))
        gc.collect()
    if cuda and not SIMULATED:
        report.write()
    failures.exit()


if __name__ == "__main__":
    main()
