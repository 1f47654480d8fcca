"""Cross-entropy that never holds all logits: torch's fused linear_cross_entropy, over the learnt tokens alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .errors import UserError

# What some families do to their logits after the head, which the fused operator would leave out.
_AFTER_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def check_chunked_loss(model: Any) -> None:
    """Refuses --chunked-loss where this torch or the model's head does not allow it."""
    if not hasattr(functional, "linear_cross_entropy"):
        raise UserError(f"--chunked-loss needs torch 2.13 or newer, this is {torch.__version__}")
    config = model.config.get_text_config()
    if any(getattr(config, name, None) for name in _AFTER_HEAD):
        raise UserError(
            f"--chunked-loss: {config.model_type} changes its logits after the head, which it cannot follow"
        )


def chunked_loss(model: Any, inputs: dict[str, Tensor], num_items: Tensor | int | None) -> Tensor:
    """The loss of ``model`` on ``inputs`` (input_ids, labels, position_ids: [1, T]), a sum over ``num_items``."""
    base = model.get_base_model()
    head = base.get_output_embeddings()
    inputs = dict(inputs)
    labels = inputs.pop("labels")[:, 1:]
    hidden = base.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    learnt = labels != -100
    loss = functional.linear_cross_entropy(
        hidden[learnt],
        head.weight,
        labels[learnt],
        linear_bias=head.bias,
        reduction="sum",
        options=torch.nn.LinearCrossEntropyOptions(),
    )
    return loss / (learnt.sum() if num_items is None else num_items)
