"""Cross-entropy of the learnt tokens alone: the output head, a fifth of a small model's work, skips the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .errors import UserError

# What some families do to their logits after the head, which this loss would leave out.
_AFTER_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def changes_logits(config: Any) -> bool:
    """Whether a model of that configuration changes its logits after the head."""
    return any(getattr(config.get_text_config(), name, None) for name in _AFTER_HEAD)


def has_plain_head(model: Any) -> bool:
    """Whether the logits of ``model`` (a PEFT model) are its output head times its last hidden state, and no more."""
    base = model.get_base_model()
    return (
        not changes_logits(base.config)
        and isinstance(base.get_output_embeddings(), torch.nn.Linear)
        and base.base_model is not base
    )


def has_linear_cross_entropy() -> bool:
    return hasattr(functional, "linear_cross_entropy")


def check_linear_cross_entropy() -> None:
    """Refuses --chunked-loss where this torch does not have it."""
    if not has_linear_cross_entropy():
        raise UserError(f"--chunked-loss needs torch 2.13 or newer, this is {torch.__version__}")


def check_chunked_loss(model: Any) -> None:
    """Refuses --chunked-loss where the model's head does not allow it."""
    if not has_plain_head(model):
        kind = model.config.get_text_config().model_type
        raise UserError(f"--chunked-loss: {kind} changes its logits after the head, which it cannot follow")


def head_loss(head: Any, hidden: Tensor, labels: Tensor, chunked: bool) -> Tensor:
    """Mean cross-entropy of the output ``head`` (an nn.Linear) over hidden states [M, K] and their labels [M]."""
    if chunked:
        options = torch.nn.LinearCrossEntropyOptions()
        return functional.linear_cross_entropy(hidden, head.weight, labels, linear_bias=head.bias, options=options)
    return functional.cross_entropy(head(hidden).float(), labels)


def learnt_loss(model: Any, inputs: dict[str, Tensor], num_items: Tensor | int | None, chunked: bool) -> Tensor:
    """The summed cross-entropy of ``model``, a PEFT model, over the learnt tokens, divided by ``num_items``.

    Args:
        inputs: input_ids, labels (-100: not learnt) and position_ids, each [B, T].
        num_items: learnt tokens of the whole optimizer step; those of ``inputs`` if None.
        chunked: use torch's linear_cross_entropy, which never holds all logits. In bfloat16 it returns a loss of
            three digits; its gradient is as good as that of the logits.
    """
    base = model.get_base_model()
    head = base.get_output_embeddings()
    inputs = dict(inputs)
    labels = inputs.pop("labels")[:, 1:]
    hidden = base.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    learnt = labels != -100
    hidden, labels = hidden[learnt], labels[learnt]
    share = 1.0 if num_items is None else len(labels) / num_items
    return head_loss(head, hidden, labels, chunked).float() * share
