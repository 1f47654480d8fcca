"""Compiled steps of batches whose sequences use different adapters of a model.

The code is that of ``step.py`` for the model without its adapters. Instead, each 4-bit layer gets stacks of all
adapters, which are inputs, as is the adapter of each sequence. So one package serves any number of adapters of these
layers, with ranks up to ``max_rank``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from qlora_ext.adapters import StackedAdapters
from qlora_ext.integrations.peft.linear import LoraLinear4bit
from qlora_ext.nn import Linear4bit
from qlora_ext.output_head import causal_lm

from .fixed import BASE, active_adapters
from .packages import load_code
from .stacks import AdapterStacks
from .step import MAX_CACHE, SEQUENCES, Step, compiled_as, step_inputs

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
    """``Step`` with more arguments: int32 [B], the adapter of each row or -1, and what ``AdapterStacks`` holds."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.step = Step(lm)
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


class MixedStep:
    """The compiled step of a model for any mixture of its adapters.

    Raises:
        CompilationError: the model cannot be compiled.
    """

    def __init__(
        self, model: Any, caches: Sequence[Tensor], stacks: AdapterStacks, progress: Callable[[str], object] | None
    ) -> None:
        self._stacks, self._caches = stacks, caches
        lm = _over_stacks(model, stacks.max_rank, {})
        step = _MixedStep(lm)
        ranks = [Dim(f"ranks_{i}", min=2, max=MAX_CACHE) for i in range(len(stacks.layers))]
        offsets, adapters = (Dim(name, min=2, max=MAX_CACHE) for name in ("offsets", "adapters"))
        shapes = {0: SEQUENCES}, {1: offsets}, {1: adapters}, [{0: rank} for rank in ranks], [{1: r} for r in ranks]
        functions = compiled_as(lm, MIXED, step, (self._rows([""] * 3), *self._operands()), shapes)
        code = load_code(lm, step, functions, progress=progress)
        assert code is not None
        self._code = code

    def _rows(self, names: Sequence[str]) -> Tensor:
        return torch.tensor([self._stacks.index(name) for name in names], dtype=torch.int32, device="cpu")

    def _operands(self) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        stacks = self._stacks
        return stacks.rank_offsets, stacks.scalings, stacks.lora_a, stacks.lora_b

    def _names(self, options: dict[str, Any], count: int) -> list[str]:
        """The adapter of each of ``count`` sequences; unknown names stand for none. Empty if each uses several."""
        names: list[str] = options.get("adapter_names") or (active_adapters(self._stacks.layers[0]) or [BASE]) * count
        return names if len(names) == count else []

    def renew(self, options: dict[str, Any]) -> None:
        """Has the next step with the adapter of a sequence copy it."""
        self._stacks.renew(self._names(options, 1))

    def __call__(self, tokens: list[int], positions: list[int], options: dict[str, Any]) -> Tensor | None:
        names = self._names(options, len(tokens))
        if not names or not self._code.is_current() or not self._stacks.follow(dict.fromkeys(names)):
            return None
        *read, caches = step_inputs(tokens, positions, self._caches)
        offsets, scalings, lora_a, lora_b = self._operands()
        return self._code[MIXED]([*read, *caches, self._rows(names), offsets, scalings, *lora_a, *lora_b])[0]


def load_mixed(
    model: Any, caches: Sequence[Tensor], progress: Callable[[str], object] | None = None
) -> MixedStep | None:
    """The step of a model with several adapters; None if it has fewer, or if they cannot be stacked.

    Raises:
        CompilationError: the model cannot be compiled.
    """
    known, lm = getattr(model, "peft_config", {}), causal_lm(model)
    # A replaced forward would be copied as one of the original module.
    if len(known) < 2 or not AdapterStacks.can_serve(lm) or any("forward" in vars(each) for each in lm.modules()):
        return None
    stacks = AdapterStacks(lm, known)
    return MixedStep(lm, caches, stacks, progress) if stacks.follow([]) else None
