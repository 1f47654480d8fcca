"""``compare``: the losses of a language model and of a reference on the same text."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..calibration import self_text
from ..calibration.stages import without_cache
from ..nn import computing_in

Text: TypeAlias = "Tensor | Iterable[Mapping[str, Tensor]]"  # see ``compare``

# Logits are computed for at most this many tokens at a time: half a gigabyte for a vocabulary of 150,000.
_TOKENS_AT_A_TIME = 1024


@dataclasses.dataclass(frozen=True)
class Increase:
    """The difference between two losses on the same text.

    Attributes:
        nats: the mean difference in nats per token; negative if the loss is lower.
        error: the standard error of the mean, from paired differences.

    Example:
        >>> increase = qlora_ext.fidelity.Increase.of(torch.tensor([3.2, 3.4, 3.3]), torch.tensor([3.0, 3.2, 3.2]))
        >>> print(increase)
        +0.1667 ± 0.0333
    """

    nats: float
    error: float

    @classmethod
    def of(cls, losses: Tensor, before: Tensor, correction: int = 1) -> Increase:
        """From losses [N] of both models. The variance of the differences is their squares' sum / (N - correction)."""
        more = (losses - before).double()
        return cls(more.mean().item(), (more.std(correction=correction) / math.sqrt(len(more))).item())

    def __str__(self) -> str:
        return f"{self.nats:+.4f} ± {self.error:.4f}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The result of ``compare``.

    Attributes:
        losses, before: of the model and of the reference, float64 [N]: of each sequence, or of each learnt token.
        loss, base_loss: their means, in nats per token.
        increase: of the loss.
    """

    losses: Tensor
    before: Tensor
    loss: float
    base_loss: float
    increase: Increase


def text_of(inputs: Any, model: nn.Module, sequences: int, length: int, seed: int, least: int) -> Tensor:
    """``inputs`` on the device of ``model``; or for "self", a text that ``model`` writes.

    Raises:
        TypeError, ValueError: ``inputs`` are not token ids [B, T] with B >= ``least`` and T >= 2.
    """
    if isinstance(inputs, str):
        if inputs != "self":
            raise ValueError(f"inputs: expected 'self' or token ids [B, T], got {inputs!r}")
        inputs = self_text.write(model, max(1, sequences), length, seed)
    if not isinstance(inputs, Tensor) or inputs.is_floating_point():
        raise TypeError(f"inputs: expected token ids [B, T], got {type(inputs).__name__}")
    if inputs.ndim != 2 or inputs.shape[0] < least or inputs.shape[1] < 2:
        raise ValueError(f"inputs: expected token ids [B, T] with B >= {least} and T >= 2, got {list(inputs.shape)}")
    return inputs.to(next(model.parameters()).device)


def logits_of(model: nn.Module, ids: Tensor, **inputs: Any) -> Tensor:
    """The logits [B, T, V] of token ids [B, T] and further inputs.

    Raises:
        TypeError: ``model`` does not return such logits.
    """
    out = model(ids, **inputs)
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape:
        raise TypeError(f"model: expected one that maps token ids [B, T] to logits [B, T, V], got {type(out).__name__}")
    return logits


def _predictions(model: nn.Module, text: Text) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [.., V] and labels: of sequences with all their tokens [B, T - 1], or of learnt tokens [N]."""
    if isinstance(text, Tensor):
        for ids in text.split(max(1, _TOKENS_AT_A_TIME // text.shape[1])):
            yield logits_of(model, ids)[:, :-1].float(), ids[:, 1:]
        return
    for batch in text:
        inputs = {**batch, "use_cache": False}
        ids, labels = inputs.pop("input_ids"), inputs.pop("labels")[:, 1:]
        learnt = labels != -100
        yield logits_of(model, ids, **inputs)[:, :-1][learnt].float(), labels[learnt]


@torch.no_grad()
def losses_of(model: nn.Module, text: Text, compute: torch.dtype | None = None) -> Tensor:
    """The losses of a language model on a text: float64 [N] on the CPU, in nats. Arguments are those of ``compare``."""
    found = []
    with without_cache(model), contextlib.nullcontext() if compute is None else computing_in(model, compute):
        for logits, labels in _predictions(model, text):
            # With V as the last dimension, the CPU sums in the order that rounds least.
            losses = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
            losses = losses.double().view(labels.shape)
            found.append((losses.mean(1) if losses.ndim == 2 else losses).cpu())
    return torch.cat(found)


def compare(
    model: nn.Module | Tensor, reference: nn.Module | Tensor, text: Text, compute: torch.dtype | None = None
) -> Comparison:
    """Compares the losses of a language model and of a reference on the same text, in the same arithmetic.

    Args:
        model, reference: modules that map token ids [B, T] to logits [B, T, V]. Of one that has changed since, or is
            compared several times, its ``losses_of``.
        text: token ids int64 [B, T], for the mean loss of each sequence; or batches of packed rows, for the loss of
            each learnt token: dictionaries of ``input_ids``, ``labels`` (-100: not learnt) and further inputs.
        compute: the dtype in which both models compute; None: their own.

    Raises:
        TypeError: a model returns no logits. ValueError: the losses of ``reference`` are those on another text.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128))
        >>> text = torch.randint(0, 128, (4, 16))
        >>> before = qlora_ext.fidelity.losses_of(model, text)
        >>> found = qlora_ext.fidelity.compare(qlora_ext.quantize_model(model), before, text)
        >>> found.increase == qlora_ext.fidelity.Increase.of(found.losses, before)
        True
    """
    losses, before = (m if isinstance(m, Tensor) else losses_of(m, text, compute) for m in (model, reference))
    if losses.shape != before.shape:
        raise ValueError(f"reference: expected its losses on the same text, {len(losses)}, got {list(before.shape)}")
    correction = 1 if isinstance(text, Tensor) else 0  # of sequences there are few, of tokens many
    increase = Increase.of(losses, before, correction)
    return Comparison(losses, before, losses.mean().item(), before.mean().item(), increase)


def perplexity(loss: float) -> float:
    """exp(loss), the perplexity of a loss in nats per token.

    Example:
        >>> qlora_ext.fidelity.perplexity(0.0)
        1.0
    """
    return math.exp(min(loss, 700.0))
