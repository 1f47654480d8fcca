"""Cross-entropy of the learnt tokens only. The output head, a fifth of a small model's work, skips the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qlora_ext import linear_dense

# Maximum number of logits in memory at a time (32 MB in float32), or the number of hidden values if that is larger.
_LOGITS = 1 << 23


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of a frozen head, computed for some tokens at a time.

    The forward also computes the gradient of ``hidden``, so that the backward need not recompute the logits.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        rows = max(1, max(_LOGITS, hidden.numel()) // len(weight))
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden if wanted else hidden[:0])
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for begin in range(0, len(hidden), rows):
            part = slice(begin, begin + rows)
            found = labels[part, None]
            logits = linear_dense.linear(hidden[part], weight, bias).float()
            normalizer = logits.logsumexp(1, keepdim=True)
            total += (normalizer - logits.gather(1, found)).sum()
            if wanted:
                slope = logits.sub_(normalizer).exp_()
                slope.scatter_add_(1, found, slope.new_full((), -1.0).expand_as(found))
                linear_dense.multiply_into(gradient[part], slope, weight)
        ctx.save_for_backward(gradient)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * (grad / len(gradient)), None, None, None


def head_loss(head: Any, hidden: Tensor, labels: Tensor, chunked: bool) -> Tensor:
    """The mean cross-entropy, float32, of the output ``head`` for hidden states [M, K] and labels [M].

    Args:
        head: an ``nn.Linear``; frozen if ``chunked``.
        chunked: never have the logits of all tokens in memory.
    """
    if chunked:
        return _ChunkedCrossEntropy.apply(hidden, head.weight, head.bias, labels)  # type: ignore[no-any-return,no-untyped-call]
    return functional.cross_entropy(head(hidden).float(), labels)


def learnt_loss(model: Any, inputs: dict[str, Tensor], num_items: Tensor | int | None, chunked: bool) -> Tensor:
    """The summed cross-entropy of ``model``, a PEFT model, over the learnt tokens, divided by ``num_items``.

    Args:
        inputs: input_ids, labels (-100: not learnt) and position_ids, each [B, T].
        num_items: number of learnt tokens of the optimizer step; None for those in ``inputs``.
        chunked: never have the logits of all tokens in memory. Only the order of summation differs.
    """
    base = model.get_base_model()
    head = base.get_output_embeddings()
    inputs = dict(inputs)
    labels = inputs.pop("labels")[:, 1:]
    hidden = base.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    learnt = labels != -100
    hidden, labels = hidden[learnt], labels[learnt]
    share = 1.0 if num_items is None else len(labels) / num_items
    return head_loss(head, hidden, labels, chunked) * share
