"""The loss of a language model on a text, and its increase over that of another model."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.stages import without_cache

# Logits are computed for at most this many tokens at a time: half a gigabyte for a vocabulary of 150,000.
_TOKENS_AT_A_TIME = 1024


@dataclasses.dataclass(frozen=True)
class Increase:
    """The difference between two losses on the same sequences.

    Attributes:
        nats: the mean difference in nats per token; negative if the loss is lower.
        error: the standard error of the mean, from paired differences per sequence.

    Example:
        >>> increase = qlora_ext.fidelity.Increase.of(torch.tensor([3.2, 3.4, 3.3]), torch.tensor([3.0, 3.2, 3.2]))
        >>> print(increase)
        +0.1667 ± 0.0333
    """

    nats: float
    error: float

    @classmethod
    def of(cls, losses: Tensor, before: Tensor) -> Increase:
        """From the mean losses per sequence [B] of both models, B >= 2."""
        more = (losses - before).double()
        return cls(more.mean().item(), (more.std() / math.sqrt(len(more))).item())

    def __str__(self) -> str:
        return f"{self.nats:+.4f} ± {self.error:.4f}"


def check_ids(ids: Any, least: int) -> Tensor:
    """``ids``, checked to be token ids [B, T] with B >= ``least`` and T >= 2.

    Raises:
        TypeError: ``ids`` is not an integer tensor. ValueError: its shape is wrong.
    """
    if not isinstance(ids, Tensor) or ids.is_floating_point():
        raise TypeError(f"inputs: expected token ids [B, T], got {type(ids).__name__}")
    if ids.ndim != 2 or ids.shape[0] < least or ids.shape[1] < 2:
        raise ValueError(f"inputs: expected token ids [B, T] with B >= {least} and T >= 2, got {list(ids.shape)}")
    return ids


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits [B, T, V] of token ids [B, T], in float32.

    Raises:
        TypeError: ``model`` does not return such logits.
    """
    out = model(ids)
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape:
        raise TypeError(f"model: expected one that maps token ids [B, T] to logits [B, T, V], got {type(out).__name__}")
    return logits.float()


@torch.no_grad()
def block_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean loss per token of each sequence of token ids [B, T], float64 [B] on the CPU.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128))
        >>> qlora_ext.fidelity.block_losses(model, torch.randint(0, 128, (4, 16))).shape
        torch.Size([4])
    """
    found = []
    with without_cache(model):
        for rows in ids.split(max(1, _TOKENS_AT_A_TIME // ids.shape[1])):
            logits = logits_of(model, rows)[:, :-1]
            losses = nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
            found.append(losses.double().mean(1).cpu())
    return torch.cat(found)
