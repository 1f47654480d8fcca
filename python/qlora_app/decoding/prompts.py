"""Reads a prompt, whole or in parts, into keys and values of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .compiled import CACHE_STEP, MAX_PROMPT, PROMPT, TOKEN, keeps_last_logits
from .packages import Code
from .step import CACHE

# For so many of the last tokens, the model computes logits: enough for the kernel of the head that training runs.
_HEAD_ROWS = 8


class PromptReader:
    """A prompt that is read whole or in parts.

    Args:
        slots: the caches of a batch, each [slots, H, capacity, D]: the keys of all layers, then the values.

    Attributes:
        count: how many tokens have been read.
    """

    def __init__(self, prompt: list[int], slots: Sequence[Tensor]) -> None:
        self.prompt, self.count = prompt, 0
        self._caches = [cache[:1, :, :0] for cache in slots]  # each [1, H, at least count, D]

    @property
    def done(self) -> bool:
        return self.count == len(self.prompt)

    def read(
        self,
        lm: Any,
        code: Code | None,
        forward: Callable[..., Any],
        most: int | None = None,
        every: bool = False,
    ) -> Tensor:
        """Reads at most ``most`` more tokens.

        Args:
            code: of compiled prompts. It reads those that it can, if it computes what the model does now.
            forward: the model's, which reads the others.
            every: return the logits after each of these tokens, which compiled functions do not compute.

        Returns:
            The logits [1, V] after the last one, or [tokens, V].
        """
        first, half = self.count, len(self._caches) // 2
        tokens = self.prompt[first:][:most]
        end = first + len(tokens)
        ids = torch.tensor([tokens], dtype=torch.int64, device=lm.device)
        name = TOKEN if len(tokens) == 1 else PROMPT
        if code is not None and name in code and len(tokens) <= MAX_PROMPT and not every and code.is_current():
            room = -(-end // CACHE_STEP) * CACHE_STEP
            caches = [nn.functional.pad(cache, (0, 0, 0, room - cache.shape[2])) for cache in self._caches]
            logits = code[name]([ids, torch.arange(first, end, dtype=torch.int64, device=lm.device), *caches])[0]
        else:
            cache = DynamicCache()
            # Layers with a sliding window keep all keys and values, too.
            cache.layers = [DynamicLayer() for _ in range(half)]
            for layer, *read in zip(cache.layers, self._caches[:half], self._caches[half:], strict=True):
                if first:
                    layer.update(*(each[:, :, :first] for each in read))
            last = {"logits_to_keep": _HEAD_ROWS} if keeps_last_logits(lm) and not every else {}
            logits = forward(input_ids=ids, use_cache=True, **{CACHE: cache}, **last).logits
            caches = [layer.keys for layer in cache.layers] + [layer.values for layer in cache.layers]
        self._caches, self.count = caches, end
        return logits[0] if every else logits[:, -1]

    def take(self, slots: Sequence[Tensor], slot: int) -> None:
        """Has the whole prompt come from a slot, whose sequence begins with it."""
        self._caches, self.count = [cache[slot : slot + 1] for cache in slots], len(self.prompt)

    def store(self, slots: Sequence[Tensor], slot: int) -> None:
        """Copies what has been read into a slot of the batch's caches."""
        for cache, read in zip(slots, self._caches, strict=True):
            cache[slot, :, : self.count] = read[0, :, : self.count]
