"""What a dense language model predicts on the calibration's text, from which its quantized copy learns."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..divergence import FORWARD, Logits, summed_divergence


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside the ``with`` statement, no parameter of ``model`` needs a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _inputs_of(batch: Any) -> dict[str, Any] | None:
    """The named inputs of a language model, without labels; None if ``batch`` has no token ids."""
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        return None
    return {name: value for name, value in batch.items() if name != "labels"}


def head_of(model: Any) -> nn.Module | None:
    """The output head of ``model``; None unless it is a decoder of transformers with one."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", True):
        return None
    head: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    return head


class Predictions:
    """The last hidden states of a dense language model for each batch, or its logits if their head is not plain.

    Args:
        model: dense, with a ``head_of``. It may be quantized afterwards.
        batches: token ids [B, T], or mappings with ``input_ids``.
        token_masks: for each batch, which tokens count, bool [B, T]; None for all.

    Raises:
        TypeError: a batch has no token ids.
    """

    def __init__(self, model: Any, batches: Sequence[Any], token_masks: Sequence[Tensor | None]) -> None:
        self._batches: list[tuple[dict[str, Any], Tensor]] = []
        for batch, mask in zip(batches, token_masks, strict=True):
            inputs = _inputs_of(batch)
            if inputs is None:
                raise TypeError(f"inputs: expected token ids to distill a language model, got {type(batch).__name__}")
            learnt = torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask
            self._batches.append((inputs, learnt[:, 1:]))
        self._vocabulary: int = model.config.get_text_config().vocab_size
        with torch.no_grad(), _frozen(model):
            dense = [self._logits(model, *batch) for batch in self._batches]
        head: Any = copy.deepcopy(head_of(model))  # the model's own may be quantized
        head.requires_grad_(False)
        self._dense = [one if one.head is None else dataclasses.replace(one, head=head) for one in dense]

    def _logits(self, model: Any, inputs: dict[str, Any], learnt: Tensor) -> Logits:
        return Logits.of(model, inputs, learnt, self._vocabulary)

    def losses(self, model: nn.Module) -> list[Callable[[], Tensor]]:
        """For each batch, the mean KL divergence of the predictions of ``model`` from these, in nats per token."""

        def loss(inputs: dict[str, Any], learnt: Tensor, dense: Logits) -> Tensor:
            with _frozen(model):
                found = self._logits(model, inputs, learnt)
                return summed_divergence(found, dense, FORWARD) / learnt.sum()

        return [functools.partial(loss, *batch, dense) for batch, dense in zip(self._batches, self._dense, strict=True)]
