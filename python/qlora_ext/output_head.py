"""A language model of transformers, and how it computes its logits from the last hidden states."""

from __future__ import annotations

from typing import Any

import torch

# Settings with which some model families change the logits after the head.
_AFTER_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier")


def causal_lm(model: Any) -> Any:
    """The language model inside PEFT's wrapper, or ``model`` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def changes_logits(config: Any) -> bool:
    """Whether a model of that configuration changes its logits after the head."""
    return any(getattr(config.get_text_config(), name, None) for name in _AFTER_HEAD)


def has_plain_head(base: Any) -> bool:
    """Whether the logits of ``base``, a language model, are just its output head applied to the last hidden state."""
    return (
        not changes_logits(base.config)
        and isinstance(base.get_output_embeddings(), torch.nn.Linear)
        and base.base_model is not base
    )
