"""PEFT over dense layers whose frozen weights keep 16 bits in a model that computes in float32."""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.tuners.lora.layer import Embedding as DenseLoraEmbedding
from peft.tuners.lora.layer import Linear as DenseLoraLinear
from torch import Tensor, nn

from ...nn.dense_16bit import Dense16bit, widen


class Over16bit:
    """A mixin, placed before a PEFT layer class, for layers whose base keeps a 16-bit weight.

    A merged weight has the dtype in which the model computes. Unmerging restores the 16-bit weight.
    """

    merged_adapters: list[str]
    # The weight before the merge; a tuple, because a module would register the parameter.
    _unmerged: tuple[nn.Parameter, ...] = ()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base = self.get_base_layer()  # type: ignore[attr-defined]
        is_narrow = isinstance(base, Dense16bit) and base.weight.dtype != base.compute_dtype
        if is_narrow and not self._unmerged:
            self._unmerged = (base.weight,)
            # A new parameter, because the output head may share the old one with the embeddings.
            base.weight = nn.Parameter(base.weight.detach().to(base.compute_dtype), requires_grad=False)
        try:
            super().merge(safe_merge, adapter_names)  # type: ignore[misc]
        finally:
            self._restore_unmerged()

    def unmerge(self) -> None:
        super().unmerge()  # type: ignore[misc]
        self._restore_unmerged()

    def _get_embed_scale(self) -> Tensor | None:
        base = self.get_base_layer()  # type: ignore[attr-defined]
        scale = getattr(base, "embed_scale", None)
        if isinstance(scale, float):  # PEFT would round it to the dtype of the weight
            return torch.tensor(scale, dtype=base.compute_dtype, device=base.weight.device)
        found: Tensor | None = super()._get_embed_scale()  # type: ignore[misc]
        return found

    def _restore_unmerged(self) -> None:
        if self._unmerged and not self.merged_adapters:
            self.get_base_layer().weight = self._unmerged[0]  # type: ignore[attr-defined]
            self._unmerged = ()


@functools.cache
def _over_16bit(cls: Any) -> Any:
    return type(f"{cls.__name__}16bit", (Over16bit, cls), {})


def merge_in_compute_dtype(layer: Any) -> None:
    """Makes a LoRA layer of PEFT merge without rounding to 16 bits if its base keeps a 16-bit weight."""
    kind: Any = type(layer)
    if kind in (DenseLoraLinear, DenseLoraEmbedding) and isinstance(layer.get_base_layer(), Dense16bit):
        layer.__class__ = _over_16bit(kind)


def widen_written(base: nn.Module, lora_config: Any, parameter: str | None) -> None:
    """Casts a 16-bit weight to the model's compute dtype if adding a LoRA adapter to it writes to the weight."""
    init = lora_config.init_lora_weights
    if isinstance(base, Dense16bit) and (parameter is not None or (isinstance(init, str) and init != "gaussian")):
        widen(base)
