"""Adapters over 4-bit weights: merged into them, which are then quantized anew, and taken out of them again."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, check_adapters_to_merge
from torch import Tensor, nn

from ...form import Form
from ...merged import kept_of, seed_of, with_update
from ...nn import Packed4bit, computing_in, is_dense, quantize_model
from ...weight import Weight4bit
from .._patches import extend
from ..transformers.modules import dequantize_modules

# What the nearest codes have to hold of an update, for nothing to be gained by rounding at random, which has the larger
# errors.
_HELD_BY_THE_NEAREST = 0.95


class Over4bit:
    """Put before a PEFT layer class: the layer with a 4-bit module as its base.

    Merging rounds the sum of a weight and its adapters to 4 bits again; unmerging gives back the old bits.
    """

    merged_adapters: list[str]
    parameter_name = "weight"
    # By which merged weights are rounded, see ``set_name``.
    rounding_seed = 0
    # What merge found: the packed weight, the tensors in the module that hold it, and the bias.
    _unmerged: tuple[Weight4bit, dict[str, Tensor], Tensor | None] | None = None

    @property
    def layer4bit(self) -> Packed4bit:
        """The 4-bit module."""
        layer = self.get_base_layer()  # type: ignore[attr-defined]
        assert isinstance(layer, Packed4bit)
        return layer

    def set_name(self, name: str) -> None:
        """Sets the layer's name in the model, from which the rounding seed of its merged weight is derived."""
        self.rounding_seed = seed_of(f"{name}.{self.parameter_name}")

    @property
    def trained_as_merged(self) -> bool:
        """Whether the merged adapters saw the codes that merging gives while they were trained."""
        return False

    @property
    def bias4bit(self) -> Tensor | None:
        """The module's bias, where adapters can have a share in it."""
        return None

    def move_adapter(self, name: str, device: torch.device) -> None:
        """Moves the modules of an adapter to ``device``, but for those that are on the meta device."""
        for names in (self.adapter_layer_names, self.other_param_names):  # type: ignore[attr-defined]
            for container in (getattr(self, attribute, None) for attribute in names):
                if isinstance(container, nn.ModuleDict) and name in container:
                    module = container[name]
                    if not any(p.is_meta for p in module.parameters()):
                        module.to(device)

    def decoded(self) -> Tensor:
        """The decoded weight in float32, in the dense weight's shape."""
        raise NotImplementedError  # no ABC: the class of a layer changes to one with this before it

    def to_dense(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """The dense module, in the dtype of the quantized weight, with what ``merged_weights`` gave in it."""
        raise NotImplementedError

    def requantize(self, weight: Tensor) -> None:
        """Makes ``weight``, rounded to the nearest codes, the 4-bit weight, in the form that it has."""
        layer = self.layer4bit
        w4 = layer.quantize(weight)
        layer.set_packed(self.parameter_name, dataclasses.replace(w4, dtype=layer.weight_dtype))

    def names_to_merge(self, adapter_names: list[str] | None) -> list[str]:
        """Of those adapters (None: the active ones) the ones that this layer has and that are not merged."""
        here = self._get_available_adapters()  # type: ignore[attr-defined]
        return [name for name in check_adapters_to_merge(self, adapter_names) if name in here]

    def merged_weights(self, names: list[str], safe_merge: bool = False) -> tuple[Tensor, Tensor | None]:
        """The decoded weight and the bias in float32 with the named adapters, merged from here on, in them."""
        if self.layer4bit.is_sharded:
            raise ValueError(
                "merge: expected an unsharded layer, got one that FSDP2 has sharded; save the adapters, and merge "
                "them in one process"
            )
        return self._merge_weights(names, safe_merge)

    def _merge_weights(self, names: list[str], safe_merge: bool) -> tuple[Tensor, Tensor | None]:
        weight = self.decoded()
        for name in names:
            weight += self.get_delta_weight(name).to(weight)  # type: ignore[attr-defined]
            if safe_merge and not weight.isfinite().all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        self.merged_adapters.extend(names)
        return weight, None

    def set_merged(self, weight: Tensor, bias: Tensor | None) -> None:
        """Takes what ``merged_weights`` gave, in 4 bits, in the place of the weight that there is.

        Where the adapters move the weights so far that the nearest codes hold the update, the sum is quantized like any
        weight. Else it is rounded under the old scales so that the codes hold it (``qlora_ext.merged``).
        """
        if self.bias4bit is not None and bias is not None:
            self.bias4bit.data = bias.detach().to(self.bias4bit.dtype)
        layer = self.layer4bit
        w4 = layer.packed_weight(self.parameter_name)
        layer.unshare(self.parameter_name)  # PEFT's layer_replication: the copies have adapters of their own
        if not self.trained_as_merged:
            before = self.decoded()
            self.requantize(weight)
            held, whole = kept_of(weight - before, before, self.decoded())
            if held >= _HELD_BY_THE_NEAREST * whole:
                return
        layer.set_packed(self.parameter_name, with_update(w4, layer.as_quantized(weight), self.rounding_seed))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters into the 4-bit weight, see ``set_merged``; ``unmerge`` gives back the old bits."""
        names = self.names_to_merge(adapter_names)
        if not names:
            return
        names = [*self.merged_adapters, *names]
        if self.merged_adapters:
            self.unmerge()
        bias = self.bias4bit
        layer = self.layer4bit
        w4 = layer.packed_weight(self.parameter_name)
        home = getattr(layer, self.parameter_name).device  # of a streamed weight, the host
        kept = w4.to(home), layer.packed_parts(self.parameter_name), None if bias is None else bias.detach().clone()
        merged = self.merged_weights(names, safe_merge)
        self._unmerged = kept
        self.set_merged(*merged)

    def unmerge(self) -> None:
        if not self.merged_adapters or self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        w4, parts, bias = self._unmerged
        self.layer4bit.put_back(self.parameter_name, w4, parts)
        if self.bias4bit is not None and bias is not None:
            self.bias4bit.data = bias.to(self.bias4bit)
        self._unmerged = None
        self.merged_adapters.clear()

    def take_merged(self, safe_merge: bool, adapter_names: list[str] | None) -> tuple[Tensor, Tensor | None] | None:
        """``merged_weights`` of the adapters merged already and those to merge, None where there are none; unmerges."""
        names = list(self.merged_adapters)
        if self.merged_adapters:
            self.unmerge()
        names += [name for name in self.names_to_merge(adapter_names) if name not in names]
        return self.merged_weights(names, safe_merge) if names else None

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The module without its adapters: 4-bit as it was or, merged, dense in the dtype of the quantized weight."""
        merged = self.take_merged(safe_merge, adapter_names) if merge else None
        return self.layer4bit if merged is None else self.to_dense(*merged)


@dataclasses.dataclass(frozen=True)
class MergeError:
    """What it costs that a merged weight has 4 bits again, Q(W + ΔW).

    Attributes:
        by_layer: ‖Q(W + ΔW) - (W + ΔW)‖ / ‖W + ΔW‖ of each layer.
        total: the same of all layers together.
        kept: how much of the update the codes hold: ⟨Q(W + ΔW) - W, ΔW⟩ / ‖ΔW‖² of all layers together. Rounding errors
            beside the update, which average out over a row, do not count.
    """

    by_layer: dict[str, float]
    total: float
    kept: float


def merge_to_4bit(model: Any) -> tuple[nn.Module, MergeError]:
    """Merges the active adapters of a PEFT model into its 4-bit weights, and drops them.

    Returns:
        The base model, still 4-bit, and the relative error that each layer and all of them together took on.

    Example:
        >>> from qlora_ext.integrations.peft import merge_to_4bit
        >>> merged, error = merge_to_4bit(model)
        >>> type(merged.model.layers[0].mlp.up_proj).__name__
        'Linear4bit'
    """
    by_layer: dict[str, float] = {}
    error = norm = held = whole = 0.0
    for name, layer in model.named_modules():
        if not isinstance(layer, Over4bit):
            continue
        if layer.merged_adapters:
            layer.unmerge()
        names = layer.names_to_merge(None)
        if not names:
            continue
        before = layer.decoded()
        exact, bias = layer.merged_weights(names)
        layer.set_merged(exact, bias)
        layer.merged_adapters.clear()
        path = name.removeprefix("base_model.model.")
        if layer.parameter_name != "weight":
            path = f"{path.replace('.base_layer', '')}.{layer.parameter_name}"
        after = layer.decoded()
        kept, update = kept_of(exact - before, before, after)
        held, whole = held + kept, whole + update
        difference = (after - exact).norm().item() ** 2
        size = exact.norm().item() ** 2
        by_layer[path] = (difference / size) ** 0.5 if size else 0.0
        error, norm = error + difference, norm + size
    base = model.unload()
    return base, MergeError(by_layer, (error / norm) ** 0.5 if norm else 0.0, held / whole if whole else 1.0)


def merge_calibrated(model: Any, calibration: Any, compute_dtype: torch.dtype | None = None) -> nn.Module:
    """Merges the active adapters of a PEFT model, and quantizes the sums for the inputs that their layers get.

    ``merge_to_4bit`` keeps the scales, and rounds at random. This looks for scales and codes by which the outputs are
    right on the calibration's tokens: better for large updates, and worse for those far below a step between codes.

    Args:
        calibration: as ``quantize_model`` takes it.
        compute_dtype: in which the model runs on the calibration's tokens; the default is its own.

    Returns:
        The base model, still 4-bit; ``calibration_of`` tells how each layer fared. Layers without an adapter keep
        their bits.

    Raises:
        ValueError: no adapter is active on a 4-bit layer; or the layers have several block sizes or scale forms.

    Example:
        >>> from qlora_ext.integrations.peft import merge_calibrated
        >>> merged = merge_calibrated(model, torch.randint(0, 128, (4, 32)))
        >>> len(qlora_ext.calibration.calibration_of(merged))
        14
    """
    forms: dict[str, tuple[Form, torch.dtype]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Over4bit) and (layer.merged_adapters or layer.names_to_merge(None)):
            forms[name.removeprefix("base_model.model.").replace(".base_layer", "")] = (
                layer.layer4bit.form,
                layer.layer4bit.compute_dtype,
            )
    if not forms:
        raise ValueError("model: expected an active adapter on a 4-bit layer, found none")
    form, dtype = next(iter(forms.values()))
    if any(other != (form, dtype) for other in forms.values()):
        raise ValueError(
            f"model: expected adapters on layers of the same form, got {sorted({*map(str, forms.values())})}"
        )
    merge_into_dense = BaseTuner.merge_and_unload.__wrapped__  # ours would decode the other layers, too
    base: nn.Module = merge_into_dense(model.base_model)
    others = [name for name, module in base.named_modules() if is_dense(module) and name not in forms]
    with contextlib.nullcontext() if compute_dtype is None else computing_in(base, compute_dtype):
        return quantize_model(
            base, skip=others, towers=True, calibration=calibration, compute_dtype=dtype, **form.keywords
        )


@extend("peft.tuners.tuners_utils:BaseTuner.merge_and_unload")
def _merge_and_unload(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    has_4bit = any(isinstance(m, Over4bit) for m in self.model.modules())
    model = original(self, *args, **kwargs)
    if not has_4bit:
        return model
    # The merged layers are dense: so become those that had no adapter, for the model to be of one kind.
    if getattr(model, "hf_quantizer", None) is not None:
        return model.dequantize()
    return dequantize_modules(model)
