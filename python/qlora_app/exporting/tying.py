"""Output heads that are tied to the embeddings, if an adapter changes only one of both."""

from __future__ import annotations

from typing import Any

import torch


def _base_of(module: Any) -> Any:
    """The module inside PEFT's wrappers."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        else:
            return module


def untie(model: Any) -> bool:
    """Gives the output head of a PEFT model its own weight, so that merging changes only what the adapter is on.

    Returns:
        Whether the adapter is on one of both, and the model ties them.
    """
    base = model.get_base_model()
    wrapped = base.get_output_embeddings(), base.get_input_embeddings()
    head, table = map(_base_of, wrapped)
    if head is None or (head, table) == wrapped or not base.config.get_text_config().tie_word_embeddings:
        return False
    if head.weight.data_ptr() == table.weight.data_ptr():
        head.weight = torch.nn.Parameter(table.weight.detach().clone(), requires_grad=False)
    return True


def tie_if_equal(model: Any, was_tied: bool) -> None:
    """Ties the head of a merged model to its embeddings again if they are still equal; else the configuration unties.

    Args:
        was_tied: the result of ``untie``.
    """
    if not was_tied:
        return
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    equal = torch.equal(head.weight, table.weight)
    if equal:
        head.weight = table.weight
    else:
        print("the adapter changed the output head or the embeddings, which are no longer tied: both are written")
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = equal
