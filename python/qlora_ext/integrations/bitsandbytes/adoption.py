"""``adopt``: converts layers that bitsandbytes has quantized to ours, in place and without a copy."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...bitsandbytes_format import CODES
from ...formats import NF4
from ...nn import BEFORE_QUANTIZE, CONVERSIONS, Linear4bit, Packed4bit, report_coverage
from ...weight import Weight4bit, quantize_nf4


@dataclasses.dataclass(frozen=True)
class Adoption:
    """The result of ``adopt``: the names of the adopted layers, and of those that were not, with the reasons."""

    adopted: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        reasons: dict[str, int] = {}
        for why in self.left.values():
            reasons[why] = reasons.get(why, 0) + 1
        left = ", ".join(f"{count} ({why})" for why, count in reasons.items())
        return f"layers adopted: {len(self.adopted)}; left to bitsandbytes: {left or 0}"


def adopt(model: nn.Module) -> Adoption:
    """Converts every ``bnb.nn.Linear4bit`` of a model to a layer of ours, in place and without a copy.

    The modules stay the same objects, with their hooks, names and adapters. Packed weights and scales keep
    bitsandbytes' memory, and biases and adapters are the same parameters, so an existing optimizer stays valid. PEFT's
    LoRA layers on top of them become fused. A transformers model keeps its configuration and ``is_loaded_in_4bit``, and
    is saved in bitsandbytes' format.

    bitsandbytes quantizes a weight when its layer is moved. A weight that it has not quantized yet gets the same codes
    from us if they are NF4. A weight that it has repacked for inference on a CPU is unpacked by bitsandbytes' own code,
    which copies it; the repacking has rounded its scales to bfloat16, which cannot be undone.

    Args:
        model: any module, including a single layer.

    Returns:
        The layers that were adopted, and those that were not, with the reason: int8, another code table, no weight
        (on the meta device), a merged adapter, a PEFT method other than LoRA, or a custom class.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: it has no bitsandbytes layer, or FSDP has sharded it; the model is unchanged.

    Example:
        >>> import bitsandbytes as bnb
        >>> model = nn.Sequential(bnb.nn.Linear4bit(64, 32, quant_type="nf4"), nn.ReLU())
        >>> print(qlora_ext.adopt(model))
        layers adopted: 1; left to bitsandbytes: 0
    """
    adoption = _adopted(model)
    if adoption.adopted:
        report_coverage(model)
    elif not adoption.left and not any(isinstance(m, Packed4bit) for m in model.modules()):
        raise ValueError(
            f"model: expected layers that bitsandbytes has quantized, got a {type(model).__name__} without any; "
            "use quantize_model for dense layers"
        )
    return adoption


def _adopted(model: nn.Module) -> Adoption:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    adopted: list[str] = []
    left: dict[str, str] = {}
    if "bitsandbytes" not in sys.modules:
        return Adoption((), left)
    theirs = dict(_their_layers(model))
    for name, layer in theirs.items():
        _refuse_sharded(name, layer)
    adapters = _adapters_over(model)
    for name, layer in theirs.items():
        try:
            lora = _lora_over(adapters.get(layer, []))
            _adopt_layer(layer)
        except ValueError as error:
            left[name] = str(error)
            continue
        for adapter in lora:
            _adopt_lora(adapter)
        adopted.append(name)
    if adopted and adapters:
        from ..peft.methods import extend_tuners

        extend_tuners(model)  # those that PEFT made before it was integrated
    if adopted and "transformers" in sys.modules:
        from .quantizer import keep_format

        keep_format(model)
    if adopted and "diffusers.models.modeling_utils" in sys.modules:
        from ..diffusers.bitsandbytes import keep_diffusers_format

        keep_diffusers_format(model)
    return Adoption(tuple(adopted), left)


def _their_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The quantized linear layers of bitsandbytes in ``model`` that are not ours already, with their names."""
    import bitsandbytes as bnb

    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) and not isinstance(module, Linear4bit):
            yield name, module


def _refuse_sharded(name: str, layer: nn.Module) -> None:
    weight = layer._parameters.get("weight")
    if weight is None or hasattr(weight, "full_tensor"):
        raise ValueError(
            f"{name}: expected an unsharded weight, got one that FSDP has sharded; adopt the model before sharding"
        )


def _unpacked_for_cpu(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Undoes bitsandbytes' repacking for inference on a CPU, with bitsandbytes' own inverse."""
    from bitsandbytes import functional

    scales, was_nested = state.absmax, state.original_nested
    data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
    if not was_nested:  # the inverse returns them transposed, and in bfloat16
        state.absmax = scales.T.reshape(-1).float()
    return data, state


def _weight_of(layer: Any) -> Weight4bit:
    """The weight of a layer of bitsandbytes, in the same memory.

    Raises:
        ValueError: the layer cannot be adopted; the message is the reason.
    """
    import bitsandbytes as bnb

    if isinstance(layer, bnb.nn.Linear8bitLt):
        raise ValueError("int8 (LLM.int8())")
    if type(layer).forward is not bnb.nn.Linear4bit.forward:
        raise ValueError(f"{type(layer).__name__}, which has its own forward")
    data: Tensor = layer.weight.detach().as_subclass(torch.Tensor)
    is_quantized = getattr(layer.weight, "bnb_quantized", True)  # a parameter that lost its class counts as quantized
    state = getattr(layer.weight, "quant_state", None) or (layer.quant_state if is_quantized else None)
    if state is None and is_quantized:
        raise ValueError("its quant_state is lost")
    kind = layer.weight.quant_type if state is None else state.quant_type
    if kind not in CODES:
        raise ValueError(f"{str(kind).upper()}, not NF4 or FP4")
    if data.is_meta:
        raise ValueError("its weight is offloaded, or not loaded yet")
    w4: Weight4bit
    if state is None:
        if kind != NF4:
            raise ValueError("FP4 that bitsandbytes has not quantized yet; move the layer to its device first")
        w4 = quantize_nf4(data, layer.weight.blocksize, layer.weight.compress_statistics)
    else:
        with torch.device("cpu"):  # bitsandbytes makes tensors on the default device
            if getattr(state, "packing_format_for_cpu", False):
                data, state = _unpacked_for_cpu(data, state)
            tensors = {f"weight.{key}": t for key, t in state.as_dict(packed=True).items()}
        w4 = Weight4bit.from_bitsandbytes({"weight": data, **tensors}, "weight")
        if state.nested:
            w4 = w4.replace(nested_offset=state.offset.reshape(()).float())
    if tuple(w4.shape) != (layer.out_features, layer.in_features):
        raise ValueError(f"its weight is {list(w4.shape)}, not {[layer.out_features, layer.in_features]}")
    return w4


@contextlib.contextmanager
def _without_hook(module: Any) -> Iterator[None]:
    """Removes accelerate's hook, which stores the forward of a class, while a module changes its class."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        yield
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(module)
    vars(module).pop("forward", None)
    yield
    add_hook_to_module(module, hook)


def _adopt_layer(layer: Any) -> None:
    from .layers import ADOPTED

    dense: type[nn.Module] = getattr(layer, "source_cls", nn.Linear)  # transformers sets it; it may be Conv1D
    if not issubclass(dense, nn.Linear):
        from . import conv1d as conv1d
    ours = next(cls for kind, cls in CONVERSIONS.items() if issubclass(dense, kind))
    w4, compute_dtype = _weight_of(layer), layer.compute_dtype
    with _without_hook(layer):
        layer.__class__ = ADOPTED[ours]
        layer.become(w4, compute_dtype)


def _adapters_over(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """The PEFT layers in ``model``, by their base layer."""
    over: dict[nn.Module, list[nn.Module]] = {}
    if "peft" in sys.modules:
        from peft.tuners.tuners_utils import BaseTunerLayer

        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                over.setdefault(module.get_base_layer(), []).append(module)
    return over


def _lora_over(adapters: list[Any]) -> list[Any]:
    """Returns ``adapters`` if all are PEFT's LoRA layers for bitsandbytes, and none is merged.

    Raises:
        ValueError: the base layer cannot be adopted; the message is the reason.
    """
    if not adapters:
        return adapters
    from peft.tuners.lora.bnb import Linear4bit as TheirLora

    for adapter in adapters:
        if type(adapter) is not TheirLora:
            method = type(adapter).__module__.split(".")[-2]
            raise ValueError(f"under PEFT's {method}, which needs bitsandbytes' layers; adopt the model first")
        if adapter.merged:
            raise ValueError("an adapter is merged into it; unmerge it first")
    return adapters


def _adopt_lora(adapter: Any) -> None:
    from ..peft.linear import LoraLinear4bit

    with _without_hook(adapter):
        adapter.__class__ = LoraLinear4bit
        adapter.fan_in_fan_out = adapter.is_target_conv_1d_layer = False


def _adopt_all(model: nn.Module) -> None:
    """Adopts bitsandbytes' layers before ``quantize_model``, which would skip them.

    Raises:
        ValueError: a layer cannot be adopted, so the model could not be saved in one format.
    """
    adoption = _adopted(model)
    if adoption.left:
        name, why = next(iter(adoption.left.items()))
        raise ValueError(
            f"model: expected dense layers, or NF4 or FP4 layers of bitsandbytes; {len(adoption.left)} bitsandbytes "
            f"layers cannot be adopted, such as {name} ({why})"
        )


BEFORE_QUANTIZE.append(_adopt_all)
