"""Loads a model with its adapter, and merges the two."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..models.adapted import Adapted
from ..models.loading import load_dense
from ..models.pretrained import has_4bit_blocks, is_4bit

if TYPE_CHECKING:
    from qlora_ext.merging.merge import MergeError


def loads_4bit(adapted: Adapted) -> bool:
    """Whether the model has an adapter or 4-bit weights, so that it is loaded in 4 bits."""
    return adapted.adapter is not None or is_4bit(adapted.source) or has_4bit_blocks(adapted.source)


def load(adapted: Adapted, dtype: torch.dtype | None = None) -> Any:
    """The model in 4 bits, with its adapter; or if it has neither an adapter nor 4-bit weights, dense.

    Args:
        dtype: of a dense model; the loader's by default.
    """
    if loads_4bit(adapted):
        return adapted.load()
    return load_dense(adapted.source, dtype or adapted.loader.dtype, adapted.loader.device)


def merge(model: Any, merged: Callable[[Any], Any] = lambda model: model.merge_and_unload()) -> Any:
    """Merges the adapter of a model with the function ``merged``. The output head is tied afterwards if it can be."""
    tied = untie(model)
    found = merged(model)
    if tied:
        _tie_if_equal(found)
    return found


def merge_codes(model: Any) -> tuple[Any, MergeError]:
    """Merges the adapter of a model into its codes, and prints how much of its update they retain."""
    from qlora_ext.integrations.peft import merge_to_4bit

    model, error = merge_to_4bit(model)
    if not error.by_layer:
        print("the adapter is on dense layers only, so no code has changed")
    else:
        worst = max(error.by_layer, key=error.by_layer.__getitem__)
        print(
            f"the codes retain {error.retained:.1%} of the adapter's update; quantization error: {error.total:.2%} of "
            f"the merged weights' norm, at most {error.by_layer[worst]:.2%} in {worst}"
        )
    return model, error


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


def _tie_if_equal(model: Any) -> None:
    """Ties the head of a merged model to its embeddings if they are equal; else its configuration unties them."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    equal = torch.equal(head.weight, table.weight)
    if equal:
        head.weight = table.weight
    else:
        print("the adapter changed the output head or the embeddings, which are no longer tied: both are written")
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = equal
