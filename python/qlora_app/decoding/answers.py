"""Answers to many prompts in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from .batch import BatchDecoder
from .requests import DecodeRequest, token_ids
from .sampling import Sampling


def generate(
    model: Any,
    prompts: Sequence[Iterable[int] | Tensor],
    sampling: Sampling | Sequence[Sampling] | None = None,
    adapters: Sequence[str | None] | None = None,
    *,
    sequences: int = 16,
    compiled: bool | None = None,
) -> list[DecodeRequest]:
    """Continues prompts of token ids, up to ``sequences`` at once.

    Args:
        model: as for ``BatchDecoder``.
        prompts: the token ids of each prompt.
        sampling: one for each prompt, or one for all. With one for all that has a seed, prompt i gets ``seed + i``.
        adapters: an adapter's name for each prompt. None: the active ones.
        sequences, compiled: as for ``BatchDecoder``.

    Returns:
        The finished requests, in the order of the prompts.

    Raises:
        ValueError: an argument is wrong.
        Exception: the error of the first request that failed.

    Example:
        >>> from qlora_app.decoding import Sampling, generate
        >>> def four_answers(model, prompt):
        ...     requests = generate(model, [prompt] * 4, Sampling(temperature=0.8, seed=0, max_new_tokens=100))
        ...     return [request.tokens for request in requests]
    """
    if not isinstance(prompts, Iterable):
        raise ValueError(f"prompts: expected a list of lists of token ids, got {prompts!r}")
    prompts = list(prompts)
    count = len(prompts)
    if sampling is None or isinstance(sampling, Sampling):
        each = (sampling or Sampling()).for_each(count)
    elif isinstance(sampling, Sequence) and all(isinstance(one, Sampling) for one in sampling):
        each = list(sampling)
    else:
        raise ValueError(f"sampling: expected a Sampling, or a list of one for each prompt, got {sampling!r}")
    names = [None] * count if adapters is None else list(adapters)
    for name, given in (("sampling", each), ("adapters", names)):
        if len(given) != count:
            raise ValueError(f"{name}: expected one for each of {count} prompts, got {len(given)}")
    if not prompts:
        return []
    ids = [token_ids(prompt) for prompt in prompts]
    most = [len(prompt) + (one.max_new_tokens or 0) for prompt, one in zip(ids, each, strict=True)]
    bounded = all(one.max_new_tokens is not None for one in each)
    engine = BatchDecoder(model, min(sequences, count), max(most) if bounded else None, compiled)
    return finished(engine, [engine.submit(*arguments) for arguments in zip(ids, each, names, strict=True)])


def finished(engine: BatchDecoder, requests: list[DecodeRequest]) -> list[DecodeRequest]:
    """Runs until all requests have ended, and raises the error of the first that failed."""
    engine.run()
    for request in requests:
        if request.error is not None:
            raise request.error
    return requests
