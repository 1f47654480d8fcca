"""How the next token of a sequence is chosen: the options, and the draw."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_ext.formats import is_integer

_SORTED_FIRST = 256  # the most likely tokens, which nearly always hold all of top_p; a full sort takes far longer
_BITS = 48  # of a draw; few enough that draw * total is below the total in float64


@dataclass(frozen=True)
class Sampling:
    """How one sequence is continued.

    The filters apply in the order of transformers: temperature, ``top_k``, ``top_p``, ``min_p``.

    Args:
        max_new_tokens: the most tokens to write. None: as many as fit into the decoder's capacity. 0: only reads the
            prompt.
        temperature: logits are divided by it. 0 always takes the most likely token.
        top_p: draws from the fewest most likely tokens that have this probability together.
        top_k: draws from this many most likely tokens. 0: from all.
        min_p: draws from tokens with at least this fraction of the most likely one's probability.
        seed: the same seed, prompt and weights give the same tokens, whatever else is in the batch (docs/compile.md
            says where kernels limit that). None: torch's default generator chooses one.
        stop_tokens: ids after which the sequence ends. None: the end-of-sequence ids of the model's generation config.
        top_logprobs: how many of the most likely tokens are recorded for each token that has a log-probability.
        prompt_logprobs: whether the tokens of the prompt have log-probabilities, too.
        allowed_tokens: called with the tokens written so far, returns which may come next: bool [V] on the CPU. The
            others have probability 0. None: all may come.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> from qlora_app.decoding import Sampling
        >>> Sampling(temperature=0.7, top_p=0.9, seed=1, max_new_tokens=64).top_k
        0
    """

    max_new_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_tokens: Iterable[int] | None = None
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    allowed_tokens: Callable[[Sequence[int]], Tensor] | None = None

    def __post_init__(self) -> None:
        least = {"max_new_tokens": 0, "seed": 0, "top_k": 0, "top_logprobs": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            optional = name in ("max_new_tokens", "seed")
            if not ((value is None and optional) or (is_integer(value) and value >= lowest)):
                raise ValueError(f"{name}: expected an integer from {lowest} on{' or None' * optional}, got {value!r}")
        self._require("temperature", lambda value: value == 0 or 1e-6 <= value < math.inf, "0 or a number from 1e-6 on")
        self._require("top_p", lambda value: 0 < value <= 1, "a number above 0 and at most 1")
        self._require("min_p", lambda value: 0 <= value <= 1, "a number from 0 to 1")
        if self.stop_tokens is not None:
            ids = tuple(self.stop_tokens) if isinstance(self.stop_tokens, Iterable) else (None,)
            if not all(map(is_integer, ids)):
                raise ValueError(f"stop_tokens: expected token ids, got {self.stop_tokens!r}")
            object.__setattr__(self, "stop_tokens", ids)

    def for_each(self, count: int) -> list[Sampling]:
        """This for each of several sequences. If it has a seed, sequence i gets ``seed + i``."""
        return [self if self.seed is None else replace(self, seed=self.seed + i) for i in range(count)]

    def _require(self, name: str, is_valid: Any, expected: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not is_valid(value):
            raise ValueError(f"{name}: expected {expected}, got {value!r}")


class Drawn(NamedTuple):
    """A token, its log-probability at the temperature, and those of the most likely tokens."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


def draw(
    logits: Tensor,
    samplings: Sequence[Sampling],
    numbers: Sequence[random.Random],
    allowed: Sequence[Tensor | None] = (),
) -> list[Drawn]:
    """Chooses a token for each row of ``logits`` [B, V]. A row's result does not depend on the other rows.

    Args:
        numbers: a source of random numbers for each row. A row with temperature 0 draws none.
        allowed: which tokens each row may choose: bool [V], or None for all.

    Returns:
        A ``Drawn`` for each row. Its ``logprob`` is NaN if the row has a NaN or no largest finite logit.
    """
    temperatures = torch.tensor([s.temperature or 1.0 for s in samplings], dtype=torch.float32, device="cpu")
    scaled = logits.detach().float().cpu() / temperatures[:, None]
    for row, mask in zip(scaled, allowed, strict=False):
        if mask is not None:
            row.masked_fill_(~mask, -math.inf)
    totals = scaled.logsumexp(-1)
    largest = scaled.argmax(-1)
    tokens = [
        _chosen(row, total, sampling, source) if sampling.temperature > 0 and bool(total.isfinite()) else int(likeliest)
        for row, total, likeliest, sampling, source in zip(scaled, totals, largest, samplings, numbers, strict=True)
    ]
    return _with_logprobs(scaled, totals, tokens, [sampling.top_logprobs for sampling in samplings])


def score(logits: Tensor, tokens: Sequence[int], sampling: Sampling) -> list[Drawn]:
    """The log-probability of a given token at each row of ``logits`` [T, V], as ``draw`` computes it."""
    scaled = logits.detach().float().cpu() / (sampling.temperature or 1.0)
    return _with_logprobs(scaled, scaled.logsumexp(-1), tokens, [sampling.top_logprobs] * len(tokens))


def _with_logprobs(scaled: Tensor, totals: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[Drawn]:
    logprobs = scaled.gather(1, torch.tensor(tokens, dtype=torch.int64, device="cpu")[:, None])[:, 0] - totals
    tops = [_top(row - total, count) for row, total, count in zip(scaled, totals, counts, strict=True)]
    return [Drawn(*each) for each in zip(tokens, logprobs.tolist(), tops, strict=True)]


def _top(logprobs: Tensor, count: int) -> list[tuple[int, float]]:
    if count == 0:
        return []
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return list(zip(ids.tolist(), values.tolist(), strict=True))


def _chosen(row: Tensor, total: Tensor, sampling: Sampling, numbers: random.Random) -> int:
    """Draws a token from the scaled logits [V] of a sequence, whose logsumexp is ``total``."""
    size, ids = len(row), None
    if 0 < sampling.top_k < size:
        row, ids = row.topk(sampling.top_k)
    elif sampling.top_p < 1:
        likely, ids = row.topk(min(_SORTED_FIRST, size))
        if float((likely - total).double().exp().sum()) < sampling.top_p:
            likely, ids = row.sort(descending=True, stable=True)
        row = likely
    probabilities = (row - total).double().exp()
    if sampling.top_p < 1:
        whole = probabilities.sum() if 0 < sampling.top_k < size else 1.0
        before = probabilities.cumsum(0) - probabilities
        probabilities = probabilities * (before < sampling.top_p * whole)
    if sampling.min_p > 0:
        probabilities = probabilities * (probabilities >= sampling.min_p * probabilities.max())
    sums = probabilities.cumsum(0)
    drawn = numbers.getrandbits(_BITS) / (1 << _BITS) * float(sums[-1])
    index = int(torch.searchsorted(sums, drawn, right=True))
    return index if ids is None else int(ids[index])
