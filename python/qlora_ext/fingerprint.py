"""Fingerprints of 4-bit bases, with which adapters identify the base on which they were trained."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from torch import nn

from .digest import update
from .formats import NF4
from .nn import Packed4bit, TiedLinear4bit, layers_of

# PEFT's additions to the names of a model's modules.
_WRAPPER = "base_model.model."
_WRAPPED = "base_layer"


def _weights(model: nn.Module) -> Iterator[tuple[str, Packed4bit, str]]:
    """The names of weights in the digest, their modules, and their names in the modules."""
    for name, module in layers_of(model):
        if isinstance(module, TiedLinear4bit):
            continue  # its weight is the table's
        path = ".".join(part for part in name.removeprefix(_WRAPPER).split(".") if part != _WRAPPED)
        for weight in module.packed_shapes:
            yield path if weight == "weight" else f"{path}.{weight}", module, weight


def fingerprint(model: nn.Module) -> str:
    """SHA-256, in 64 hexadecimal digits, over the names, codes and scales of the model's 4-bit layers.

    It does not depend on PEFT's wrapping, the device, the compute dtype or dense modules. An adapter that
    ``merge_adapter`` merges changes it. If FSDP2 has sharded the model, every rank must call this, because the layers
    are gathered one at a time.

    Raises:
        ValueError: the model has no 4-bit layer.
    """
    digest = hashlib.sha256(b"qlora_ext 4-bit base, 1\n")
    weights = sorted(_weights(model), key=lambda item: item[0])
    if not weights:
        raise ValueError("model: expected a model with 4-bit layers (see qlora_ext.quantize_model), found none")
    for name, module, weight in weights:
        w4 = module.packed_weight(weight)  # one at a time, because those of a streamed or sharded model are copies
        form = "" if w4.code == NF4 and not w4.form.has_more_tensors else f" {w4.form}"
        digest.update(f"\n{name} {list(w4.shape)} {w4.block_size} {w4.nested_block_size}{form}:".encode())
        for tensor in w4.tensors.values():
            update(digest, tensor)
    return digest.hexdigest()
