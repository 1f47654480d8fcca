"""Encodes the base of an adapter in the 4-bit format in which the model will be served."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as DenseLoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..checkpoints import select_rows
from ..checkpoints.compressed_tensors_files import joined_layers
from ..fingerprint import fingerprint
from ..form import Form
from ..formats import FLOAT32, NESTED8, NF4, SERVED_FORMATS
from ..nn import Experts4bit, Linear4bit, Linear16bit, TiedLinear4bit, activations_of, layers_of
from ..weight import Weight4bit, quantize
from .layers import Over4bit

# Layers whose rows servers join are encoded together in this format, because they have one factor.
_WITH_FACTOR = "nvfp4"
_PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class TargetFormat:
    """The format in which the base of a PEFT model was encoded.

    Attributes:
        name: of the format.
        fingerprint: that of the base before.
    """

    name: str
    fingerprint: str


def target_format(peft_model: Any) -> TargetFormat | None:
    """The format in which ``encode_base`` has encoded the base; None if it has not."""
    found: TargetFormat | None = getattr(peft_model, "target_format", None)
    return found


def is_in(form: Form, code: str) -> bool:
    """Whether a form is the format ``code``. NF4 and INT4 may have other blocks than the recipe's."""
    own = Form.named(code)
    if own.code == NF4:
        return form.code == NF4 and form.scales in (FLOAT32, NESTED8) and form.offsets is None
    return form == (dataclasses.replace(own, block_size=form.block_size) if code == "int4" else own)


def _fits(width: int, code: str) -> bool:
    """Whether files in that format hold rows of ``width`` elements."""
    form = Form.named(code)
    return form.code == NF4 or width % form.block_size == 0


def _is_dense_lora(module: nn.Module) -> bool:
    return isinstance(module, DenseLoraLinear) and type(module.base_layer) in (nn.Linear, Linear16bit)


def encode_base(peft_model: Any, code: str) -> None:
    """Encodes the base of ``peft_model`` in the format ``code``, and records that in its attribute ``target_format``.

    This reaches 4-bit layers, and the dense linear layers with an adapter, except the output head.

    Raises:
        ValueError: there is no such format; the base is in another one for an earlier adapter, has no 4-bit layer, or
            is sharded or streamed; or an adapter is on the output head.
    """
    if code not in SERVED_FORMATS:
        raise ValueError(f"code: expected {', '.join(SERVED_FORMATS)}, got {code!r}")
    earlier = target_format(peft_model)
    if earlier is not None and earlier.name != code:
        raise ValueError(f"code: expected {earlier.name}, the format of the base for an earlier adapter, got {code}")
    for name, layer in layers_of(peft_model):
        if layer.is_sharded or layer.residency is not None:
            how = "streamed" if layer.residency is not None else "sharded; call set_merge_aware before fully_shard"
            raise ValueError(f"peft_model: expected layers in memory, got {name}, which is {how}")
    target = earlier or TargetFormat(code, fingerprint(peft_model))
    layers, activations = _linear_layers(peft_model, code), activations_of(peft_model)
    for group in joined_layers(layers) if code == _WITH_FACTOR else [[name] for name in layers]:
        _encode({name: layers[name] for name in group}, code, activations)
    for layer in peft_model.modules():
        if isinstance(layer, Experts4bit) and not all(is_in(form, code) for form in layer.forms.values()):
            _encode_experts(layer, code)
    peft_model.target_format = target


def _linear_layers(peft_model: Any, code: str) -> dict[str, Linear4bit | DenseLoraLinear]:
    """The layers to encode, by their names without adapters: 4-bit ones, and PEFT's layers over dense ones."""
    head = getattr(peft_model.get_base_model(), "get_output_embeddings", lambda: None)()
    found: dict[str, Linear4bit | DenseLoraLinear] = {}
    for name, module in peft_model.named_modules():
        if module is head and isinstance(module, BaseTunerLayer):
            raise ValueError(f"adapter_name: expected no adapter on the output head, which files keep as it is: {name}")
        is_4bit = isinstance(module, Linear4bit) and not isinstance(module, TiedLinear4bit)
        if module is head or not (is_4bit or _is_dense_lora(module)):
            continue
        linear = module if is_4bit else module.base_layer
        if _fits(linear.in_features, code):
            found[name.removeprefix(_PREFIX).replace(".base_layer", "")] = module
    return found


def _encode(group: dict[str, Linear4bit | DenseLoraLinear], code: str, activations: str) -> None:
    """Encodes layers of the same width as one weight."""
    if all(isinstance(layer, Linear4bit) and is_in(layer.form, code) for layer in group.values()):
        return
    weights = [_weight(layer) for layer in group.values()]
    for (name, layer), w4 in zip(group.items(), quantize_joined(weights, Form.named(code)), strict=True):
        _put(name, layer, w4, activations)


def quantize_joined(weights: Sequence[Tensor], form: Form) -> list[Weight4bit]:
    """Encodes weights [N, K] of the same width as one, because some formats have a factor that all of them share."""
    joined = quantize(torch.cat([*weights]), form)
    if len(weights) == 1:
        return [joined]
    parts = torch.arange(joined.shape[0], dtype=torch.int64, device=joined.device).split([len(w) for w in weights])
    return [select_rows(joined, part) for part in parts]


def _weight(layer: Linear4bit | DenseLoraLinear) -> Tensor:
    """The weight, float32 [N, K]. A dense one is rounded to bfloat16, so that its codes do not depend on its dtype."""
    if isinstance(layer, Linear4bit):
        return layer.dequantize(torch.float32)
    weight: Tensor = layer.base_layer.weight
    return weight.detach().bfloat16().float()


def _put(name: str, layer: Linear4bit | DenseLoraLinear, w4: Weight4bit, activations: str) -> None:
    """Replaces the weight of a layer, and makes a dense layer with an adapter 4-bit, with these ``activations``."""
    if isinstance(layer, Linear4bit):
        layer.unshare("weight")
        layer.set_packed("weight", w4.replace(dtype=layer.weight_dtype))
        return
    dense = layer.base_layer
    layer.base_layer = Linear4bit.from_linear(dense, activations=activations, **w4.form.keywords)
    layer.base_layer.set_packed("weight", w4.replace(dtype=dense.weight.dtype))
    layer.__class__ = Over4bit.lora_linear
    layer.set_name(name)


def _encode_experts(experts: Experts4bit, code: str) -> None:
    weights = {name: experts.packed_weight(name) for name in experts.packed_shapes}
    if not all(_fits(w4.shape[-1], code) for w4 in weights.values()):
        return
    for name, w4 in weights.items():
        stack = Weight4bit.stack([quantize(w, code) for w in w4.dequantize(torch.float32)])
        experts.unshare(name)
        experts.set_packed(name, stack.replace(dtype=w4.dtype))
