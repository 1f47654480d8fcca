"""Selects those of transformers' conversions between files and models that are safe for packed weights.

transformers concatenates or splits weights while it saves them if the files of a model family have q, k and v in one
tensor, or each expert in its own. It also renames weights. These operations do not handle the scales of packed weights,
so packed weights are written and read under their names in the model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from ...nn import Packed4bit


def _packed_names(model: nn.Module) -> tuple[list[str], list[str]]:
    """The names of the packed weights in ``model``, and the names of all their tensors.

    Layers whose names differ only in numbers are represented by one, because conversions treat them alike.
    """
    layers: dict[str, tuple[str, Packed4bit]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Packed4bit):
            layers.setdefault(re.sub(r"\d+", "*", name), (f"{name}." if name else "", module))
    weights = [prefix + weight for prefix, module in layers.values() for weight in module.packed_shapes]
    return weights, [prefix + name for prefix, module in layers.values() for name in module.packed_state()]


def _is_computed(conversion: Any) -> bool:
    from transformers.core_model_loading import WeightConverter

    return isinstance(conversion, WeightConverter)


def _is_prefix(conversion: Any) -> bool:
    from transformers import core_model_loading

    return isinstance(conversion, getattr(core_model_loading, "PrefixChange", ()))


def _matches(conversion: Any, names: list[str]) -> bool:
    return any(conversion.rename_source_key(name)[1] is not None for name in names)


def for_saving(model: Any, conversions: list[Any] | None) -> list[Any]:
    """The ``conversions`` (None: the default ones) for saving ``model``, without those that break packed weights."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    if conversions is None:  # the default of transformers for a model that was not read from files
        conversions = [c for c in get_model_conversion_mapping(model, add_legacy=False) if not _is_prefix(c)]
    weights, names = _packed_names(model)
    fitting = [c for c in conversions if not (_is_computed(c) and _matches(c.reverse_transform(), weights))]
    return _without_lossy_renamings(fitting, names)


def for_loading(model: nn.Module, conversions: list[Any]) -> list[Any]:
    """The ``conversions`` for loading our checkpoint into ``model``, without those that break packed weights."""
    weights, names = _packed_names(model)
    fitting = [c for c in conversions if not (_is_computed(c) and _matches(c, weights))]
    # Prefixes come from files of other models; saving does not add them.
    return _without_lossy_renamings(fitting, names, is_saved=lambda c: not _is_prefix(c))


def _round_trip(name: str, renamings: list[Any], is_saved: Callable[[Any], bool]) -> tuple[str, list[int]]:
    """The name after saving and loading, and the indices of the ``renamings`` that changed it, the last one first.

    Saving reverses the renamings for which ``is_saved`` is true.
    """
    applied: list[int] = []

    def rename(i: int, renaming: Any) -> None:
        nonlocal name
        new, _ = renaming.rename_source_key(name)
        if new != name:
            applied.insert(0, i)
        name = new

    for i in reversed(range(len(renamings))):
        if is_saved(renamings[i]):
            rename(i, renamings[i].reverse_transform())
    for i, renaming in enumerate(renamings):
        rename(i, renaming)
    return name, applied


def _without_lossy_renamings(
    conversions: list[Any], names: list[str], is_saved: Callable[[Any], bool] = lambda _: True
) -> list[Any]:
    """``conversions`` without the renamings after which one of ``names`` is saved and loaded under another name.

    An example is the renaming of a file's ``proj`` to the model's ``proj.weight``: the scales ``proj.absmax`` would be
    loaded as ``proj.weight.absmax``.
    """
    remaining = list(conversions)
    for name in names:
        while True:
            indices = [i for i, c in enumerate(remaining) if not _is_computed(c)]
            renamings = copy.deepcopy([remaining[i] for i in indices])  # renamings record their use
            found, applied = _round_trip(name, renamings, is_saved)
            if found == name or not applied:
                break
            without = {i: renamings[:i] + renamings[i + 1 :] for i in applied}
            culprit = next((i for i in applied if _round_trip(name, without[i], is_saved)[0] == name), applied[0])
            del remaining[indices[culprit]]
    return remaining
