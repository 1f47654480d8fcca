"""The 4-bit weights that merge-aware LoRA layers run with, computed when their adapters have changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...merged import merged_weight
from ...weight import Weight4bit, has_values
from .._patches import extend
from .merge import Over4bit


def fold_scaling(b: Tensor, scaling: float | Tensor) -> tuple[Tensor, float]:
    """B and the scaling as a number, which the operators require.

    ``prepare_model_for_compiled_hotswap`` of PEFT makes the scaling a tensor, so that one compiled graph serves all
    adapters. B is then multiplied by it.
    """
    return (b * scaling, 1.0) if isinstance(scaling, Tensor) else (b, scaling)


@dataclasses.dataclass(frozen=True)
class _Merged:
    """A merged weight, and what it was computed from.

    Attributes:
        identity: of the tensors, with their versions.
        contents: copies of A and B, where they were kept.
    """

    weight: Weight4bit
    identity: tuple[Any, ...]
    contents: tuple[Tensor, Tensor] | None


class MergeAware(Over4bit):
    """A mixin, placed before a PEFT layer class, for LoRA layers that can run with the weight that merging gives."""

    # Adapters that run, and are trained, with that weight; set by ``set_merge_aware``.
    merge_aware: frozenset[str] = frozenset()
    lora_A: Any
    lora_B: Any
    training: bool
    _merged: _Merged | None = None

    def factors(self, adapter: str) -> tuple[Tensor, Tensor, float | Tensor]:
        """A, B and the scaling of an adapter. Of stacks, A and B are stacks too."""
        raise NotImplementedError  # not abstract: PEFT's layers change their class at run time

    def refuse_merge_aware(self, names: Sequence[str]) -> None:
        """Raises a ValueError if one of ``adapter_names`` is merge-aware."""
        if aware := self.merge_aware.intersection(names):
            raise ValueError(
                "adapter_names: expected adapters that are not merge-aware, because a merged weight serves a whole "
                f"batch, got {', '.join(sorted(aware))}; make it the active adapter and leave adapter_names out"
            )

    def trained_weight(self, names: list[str]) -> Weight4bit | None:
        """The weight with the adapters ``names``, if it is the one that they were trained with; else None."""
        if len(names) != 1 or names[0] not in self.merge_aware:
            return None
        a, b, scaling = self.factors(names[0])
        w4 = self.layer4bit.packed_weight(self.parameter_name)
        return merged_weight(w4, a, *fold_scaling(b, scaling), self.rounding_seed)

    def merged_for(self, adapter: str) -> Weight4bit:
        """The weight with ``adapter``, kept until one of them changes.

        In training on the CPU, A and B are compared with copies, because optimizers may write to memory behind torch's
        back. On other devices the host would have to wait for the comparison, so each forward computes the weight.
        """
        layer = self.layer4bit
        a, b, scaling = self.factors(adapter)
        w4 = layer.packed_weight(self.parameter_name)
        packed = layer.packed_state()[self.parameter_name]
        traced = not has_values(packed) or torch._C._are_functorch_transforms_active()
        if traced or layer.is_gathered or isinstance(scaling, Tensor):
            self._merged = None
            return merged_weight(w4, a, *fold_scaling(b, scaling), self.rounding_seed)
        trains = self.training or torch.is_grad_enabled()
        compares = trains and a.device.type == b.device.type == "cpu"
        if trains and not compares:
            self._merged = None
            return merged_weight(w4, a, b, scaling, self.rounding_seed)
        made_of = (packed,) if compares else (packed, self.lora_A[adapter].weight, self.lora_B[adapter].weight)
        identity = adapter, scaling, self.rounding_seed, *((id(t), t.data_ptr(), t.dtype, t._version) for t in made_of)
        found = self._merged  # read once, because another thread may replace it
        if found is None or found.identity != identity or (compares and not _equal(found.contents, (a, b))):
            contents = (a.detach().clone(), b.detach().clone()) if compares else None
            found = _Merged(merged_weight(w4, a, b, scaling, self.rounding_seed), identity, contents)
            self._merged = found
        return found.weight


def _equal(copies: tuple[Tensor, Tensor] | None, now: tuple[Tensor, Tensor]) -> bool:
    return copies is not None and all(
        c.dtype == t.dtype and torch.equal(c, t) for c, t in zip(copies, now, strict=True)
    )


@extend("peft.utils.hotswap:hotswap_adapter_from_state_dict")
def _hotswap_adapter_from_state_dict(original: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    original(model, *args, **kwargs)
    for module in model.modules():
        if isinstance(module, MergeAware):
            module._merged = None
