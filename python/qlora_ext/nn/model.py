"""``quantize_model``: the walk that puts 4-bit layers into a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .linear import Linear4bit

# The layers that quantize_model replaces, and by what; an integration adds those of its library.
CONVERSIONS: dict[type[nn.Module], type[Linear4bit]] = {nn.Linear: Linear4bit}
# Called with every model that quantize_model has quantized.
AFTER_QUANTIZE: list[Callable[[nn.Module], None]] = []


def paths_to(name: str) -> list[str]:
    """The dotted names of the modules from the outermost to ``name`` itself: a, a.b, a.b.c."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def quantize_model(
    model: nn.Module,
    skip: Iterable[str] = ("lm_head",),
    block_size: int = 64,
    double_quant: bool = True,
    **options: Any,
) -> nn.Module:
    """Replaces every linear layer of ``model`` by a ``Linear4bit``, in place and one layer at a time.

    That is every ``nn.Linear`` (no subclass of it) and every ``Conv1D`` of transformers. A transformers model is then
    one that ``save_pretrained`` saves in 4 bits.

    Args:
        model: its parameters are freed as they are quantized. A module used in several places stays shared, and one
            whose weight is another module's too (an embedding's) is left as it is.
        skip: names of modules to leave alone, with all that is in them: a full dotted name, or its last parts
            (``"lm_head"``, ``"mlp.gate"``).
        block_size, double_quant: as in ``quantize_nf4``; further ``options`` go to ``Linear4bit.from_linear``.

    Returns:
        ``model`` (or its replacement, where ``model`` itself is a linear layer).
    """
    skip = tuple(skip)

    def skipped(name: str) -> bool:
        return any(f".{path}".endswith(f".{s}") for path in paths_to(name) for s in skip)

    def replace(linear: nn.Module) -> Linear4bit:
        cls = CONVERSIONS[type(linear)]
        return cls.from_linear(linear, block_size=block_size, double_quant=double_quant, **options)  # type: ignore[arg-type]

    if type(model) in CONVERSIONS:
        return replace(model)
    tied = {id(p) for m in model.modules() if type(m) not in CONVERSIONS for p in m.parameters(recurse=False)}
    done: dict[nn.Module, Linear4bit] = {}
    for parent_name, parent in list(model.named_modules()):
        if skipped(parent_name):
            continue
        for child_name, child in list(parent._modules.items()):  # named_children() gives a shared one once
            name = f"{parent_name}.{child_name}" if parent_name else child_name
            if child is None or type(child) not in CONVERSIONS or skipped(name) or id(child.weight) in tied:
                continue
            if child not in done:
                done[child] = replace(child)
            setattr(parent, child_name, done[child])
            child.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    for finish in AFTER_QUANTIZE:
        finish(model)
    return model
