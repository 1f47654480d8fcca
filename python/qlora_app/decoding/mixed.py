"""Compiled steps of batches whose sequences use different adapters of a model.

The code is that of ``batch_step.py`` for the model without its adapters. Instead, each 4-bit layer gets stacks of all
adapters, which are inputs, as is the adapter of each sequence. So one package serves any number of adapters of these
layers, with ranks up to ``max_rank``.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from qlora_ext.adapters import StackedAdapters
from qlora_ext.integrations.peft.call_cache import chooses_adapters_by_sample
from qlora_ext.integrations.peft.linear import LoraLinear4bit
from qlora_ext.nn import Linear4bit

from . import batch_step, compiled
from .batch_step import BatchStep, compile_step, step_arguments
from .compiled import MAX_CACHE
from .packages import causal_lm, digest, load_code, state_of
from .stacks import AdapterStacks

MIXED = "mixed"


class _StackedLayer(nn.Module):
    """A 4-bit layer with several adapters, in the place of PEFT's layer."""

    def __init__(self, layer: Linear4bit, max_rank: int) -> None:
        super().__init__()
        self.base_layer, self.max_rank = layer, max_rank
        self.adapters: StackedAdapters | None = None
        self.adapter_of_row: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer.fused_forward(x, self.adapters, adapter_of_row=self.adapter_of_row)

    def extra_repr(self) -> str:  # a part of the package's name
        return f"max_rank={self.max_rank}"


def _over_stacks(module: Any, max_rank: int, made: dict[int, Any]) -> Any:
    """A copy of a model's modules in which layers with adapters take stacks. It has the same tensors.

    Args:
        made: the copies by the id of the module.
    """
    if id(module) in made:
        return made[id(module)]
    if isinstance(module, LoraLinear4bit):
        copied: Any = _StackedLayer(module.layer4bit, max_rank)
    else:
        copied = object.__new__(type(module))
        children = {name: child and _over_stacks(child, max_rank, made) for name, child in module._modules.items()}
        vars(copied).update(vars(module), _modules=children)
        vars(copied).pop("peft_config", None)  # what PEFT leaves in a model
    made[id(module)] = copied
    return copied


class _MixedStep(nn.Module):
    """``BatchStep`` with more arguments: int32 [B], the adapter of each row or -1, and what ``AdapterStacks`` holds."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.step = BatchStep(lm)
        self._layers = [module for module in lm.modules() if isinstance(module, _StackedLayer)]

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        visible: Tensor,
        caches: list[Tensor],
        adapter_of_row: Tensor,
        rank_offsets: Tensor,
        scalings: Tensor,
        lora_a: list[Tensor],
        lora_b: list[Tensor],
    ) -> Tensor:
        for i, layer in enumerate(self._layers):
            layer.adapters = StackedAdapters(lora_a[i], lora_b[i], rank_offsets[i], scalings[i], layer.max_rank)
            layer.adapter_of_row = adapter_of_row
        try:
            logits: Tensor = self.step(tokens, positions, visible, caches)
        finally:
            for layer in self._layers:
                layer.adapters = layer.adapter_of_row = None
        return logits


class MixedSteps:
    """The steps of a model for any mixture of its adapters.

    Raises:
        CompilationError: the model cannot be compiled.
    """

    def __init__(self, model: Any, stacks: AdapterStacks, progress: Callable[[str], object] | None = None) -> None:
        self._stacks = stacks
        lm = _over_stacks(model, stacks.max_rank, {})
        step = _MixedStep(lm)
        name = digest(lm, state_of(step), [__file__, batch_step.__file__, compiled.__file__])
        code = load_code(name, step, lambda package: self._compile(lm, step, package), progress=progress)
        assert code is not None
        self._code = code

    def _compile(self, lm: Any, step: _MixedStep, package: pathlib.Path) -> None:
        arguments, shapes = step_arguments(lm)
        ranks = [Dim(f"ranks_{i}", min=2, max=MAX_CACHE) for i in range(len(self._stacks.layers))]
        offsets, adapters = (Dim(name, min=2, max=MAX_CACHE) for name in ("offsets", "adapters"))
        more = self._rows([""] * len(arguments[0])), *self._inputs()
        of_more = {0: shapes[0][0]}, {1: offsets}, {1: adapters}, [{0: rank} for rank in ranks], [{1: r} for r in ranks]
        compile_step(lm, MIXED, step, (*arguments, *more), (*shapes, *of_more), package)

    def _rows(self, names: Sequence[str]) -> Tensor:
        return torch.tensor([self._stacks.index(name) for name in names], dtype=torch.int32, device="cpu")

    def _inputs(self) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        stacks = self._stacks
        return stacks.rank_offsets, stacks.scalings, stacks.lora_a, stacks.lora_b

    def renew(self, names: Sequence[str]) -> None:
        """Has the next step with one of these adapters copy it."""
        self._stacks.renew(names)

    def run(self, names: Sequence[str], arguments: list[Tensor]) -> Tensor | None:
        """The logits of a step.

        Args:
            names: an adapter per sequence. Unknown names stand for none.
            arguments: those of ``BatchStep``.

        Returns:
            None if the code does not compute what the model does now.
        """
        if chooses_adapters_by_sample() or not self._stacks.follow(dict.fromkeys(names)) or not self._code.is_current():
            return None
        offsets, scalings, lora_a, lora_b = self._inputs()
        return self._code[MIXED]([*arguments, self._rows(names), offsets, scalings, *lora_a, *lora_b])[0]


def load_mixed(model: Any, progress: Callable[[str], object] | None = None) -> MixedSteps | None:
    """The steps of a model with several adapters; None if it has fewer, or if they cannot be stacked.

    Raises:
        CompilationError: the model cannot be compiled.
    """
    known, lm = getattr(model, "peft_config", {}), causal_lm(model)
    # A replaced forward would be copied as one of the original module.
    if len(known) < 2 or not AdapterStacks.can_serve(lm) or any("forward" in vars(each) for each in lm.modules()):
        return None
    stacks = AdapterStacks(lm, known)
    return MixedSteps(lm, stacks, progress) if stacks.follow([]) else None
