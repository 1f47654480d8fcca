"""Merge-aware training: the forward uses the codes of the merged or exported model, so these lose nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

from ..weight import Weight4bit, has_values
from .codes import merged_weight
from .layers import Over4bit
from .target_format import encode_base, is_in, target_format


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

    def _merge(self, adapter: str) -> Weight4bit:
        a, b, scaling = self.factors(adapter)
        w4 = self.layer4bit.packed_weight(self.parameter_name)
        return merged_weight(w4, a, *fold_scaling(b, scaling), self.rounding_seed)

    def trained_weight(self, names: list[str]) -> Weight4bit | None:
        """The weight with the adapters ``names``, if it is the one that they were trained with; else None."""
        return self._merge(names[0]) if len(names) == 1 and names[0] in self.merge_aware else None

    def merged_for(self, adapter: str) -> Weight4bit:
        """The weight with ``adapter``, kept until one of them changes.

        In training on the CPU, A and B are compared with copies, because optimizers may write to memory behind torch's
        back. On other devices the host would have to wait for the comparison, so each forward computes the weight.
        """
        layer = self.layer4bit
        a, b, scaling = self.factors(adapter)
        packed = layer.packed_state()[self.parameter_name]
        traced = not has_values(packed) or torch._C._are_functorch_transforms_active()
        trains = self.training or torch.is_grad_enabled()
        compares = trains and a.device.type == b.device.type == "cpu"
        if traced or layer.is_gathered or isinstance(scaling, Tensor) or (trains and not compares):
            self.forget_merged()
            return self._merge(adapter)
        made_of = (packed,) if compares else (packed, self.lora_A[adapter].weight, self.lora_B[adapter].weight)
        identity = adapter, scaling, self.rounding_seed, *((id(t), t.data_ptr(), t.dtype, t._version) for t in made_of)
        found = self._merged  # read once, because another thread may replace it
        if found is None or found.identity != identity or (compares and not _equal(found.contents, (a, b))):
            contents = (a.detach().clone(), b.detach().clone()) if compares else None
            found = _Merged(self._merge(adapter), identity, contents)
            self._merged = found
        return found.weight

    def forget_merged(self) -> None:
        self._merged = None


def _equal(copies: tuple[Tensor, Tensor] | None, now: tuple[Tensor, Tensor]) -> bool:
    return copies is not None and all(
        c.dtype == t.dtype and torch.equal(c, t) for c, t in zip(copies, now, strict=True)
    )


def _layers(peft_model: Any, adapter_name: str) -> list[LoraLayer]:
    return [m for m in peft_model.modules() if isinstance(m, LoraLayer) and adapter_name in m.lora_A]


def set_merge_aware(
    peft_model: Any, aware: bool = True, adapter_name: str = "default", code: str | None = None
) -> None:
    """Makes an adapter run, and train, with the 4-bit weights of the merged or exported model.

    The layers' outputs are bit for bit those of that model. Gradients ignore the rounding (straight-through estimator).
    Each step additionally decodes and encodes every weight, and keeps another half a byte per weight, on the CPU until
    the adapter has changed. ``save_pretrained`` records the setting next to the adapter, and loading the adapter
    restores it.

    Args:
        aware: False ends merge-aware training. A base that ``code`` has changed stays in that format.
        adapter_name: the adapter.
        code: the format in which the model will be served: ``"q4_0"``, ``"iq4_nl"``, ``"int4"``, ``"nvfp4"``,
            ``"mxfp4"`` or ``"nf4"``. The base is encoded in it, in memory: its 4-bit layers, and the linear ones with
            an adapter. Layers whose rows are no multiple of the format's blocks stay as they are. None keeps the
            format of each 4-bit layer, as ``merge_to_4bit`` does; layers of more bits are trained as usual. Call this
            before ``fully_shard``.

    Raises:
        ValueError: the adapter has dropout, which merged weights cannot have; it is on no 4-bit layer, or is not plain
            LoRA; or the base cannot be encoded in that format.

    Example:
        >>> from qlora_ext.integrations.peft import set_merge_aware
        >>> set_merge_aware(model)
    """
    if code is not None and aware:
        _check(peft_model, adapter_name)
        encode_base(peft_model, code)
    layers = [m for m in _layers(peft_model, adapter_name) if isinstance(m, MergeAware) and m.layer4bit.form.bits == 4]
    if not layers:
        raise ValueError(f"adapter_name: expected an adapter on 4-bit layers, got {adapter_name!r}")
    if aware:
        _check(peft_model, adapter_name)
    target = target_format(peft_model)
    for layer in layers:
        fits = target is None or is_in(layer.layer4bit.form, target.name)
        if aware and fits:
            layer.merge_aware = layer.merge_aware | {adapter_name}
        else:
            layer.merge_aware = layer.merge_aware - {adapter_name}


def _check(peft_model: Any, adapter_name: str) -> None:
    """Rejects adapters that cannot be merged exactly."""
    config = peft_model.peft_config.get(adapter_name)
    if config is not None and config.lora_dropout > 0.0:
        raise ValueError(
            f"lora_dropout: expected 0, because a merged adapter has no dropout, got {config.lora_dropout}"
        )
    if any(adapter_name in m.lora_variant for m in _layers(peft_model, adapter_name)):
        raise ValueError(f"adapter_name: expected plain LoRA, got {adapter_name!r}, which is a variant of LoRA")


def merge_aware_format(peft_model: Any, adapter_name: str = "default") -> str | bool:
    """The ``code`` for which ``set_merge_aware`` was called for the adapter; True without one, False if it was not."""
    aware = any(isinstance(m, MergeAware) and adapter_name in m.merge_aware for m in peft_model.modules())
    target = target_format(peft_model)
    return target.name if aware and target is not None else aware
