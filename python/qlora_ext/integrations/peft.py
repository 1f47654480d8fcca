"""PEFT (>= 0.19): LoRA on ``Linear4bit`` as one fused operator, with PEFT's own adapters, files and switches.

``get_peft_model`` and ``PeftModel.from_pretrained`` put a ``LoraLinear4bit`` where they find a ``Linear4bit``, and
PEFT's other methods run over one by their own code. This module is imported by itself as soon as PEFT is, and adds to
some of its functions: the making of layers, ``merge_and_unload``, ``prepare_model_for_kbit_training``, the count of
parameters, ``replace_lora_weights_loftq``, and saving and loading adapters (the base's fingerprint).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import peft.utils
import peft.utils.loftq_utils
import peft.utils.other
import torch
from peft.mixed_model import PeftMixedModel
from peft.peft_model import PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, check_adapters_to_merge
from torch import nn

from .._outside import FileError, excerpt, printable, read_json
from ..fingerprint import fingerprint
from ..nn import Linear4bit, Packed4bit, layers_of
from ._counting import hidden_parameters
from ._peft_layers import LoraLinear4bit, Over4bit, create_over_4bit
from ._peft_loftq import replace_lora_weights
from ._peft_weights import MergesAnew, create_over_weights

BASE_FILE = "qlora_base.json"
FORMAT_VERSION = 1

OnMismatch = Literal["refuse", "warn", "ignore"]
# What loading an adapter that was trained on another 4-bit base does, where the caller does not say.
on_base_mismatch: OnMismatch = "warn"


class IncompleteAdapterWarning(UserWarning):
    """An adapter was put on a 4-bit base though its files lack weights, or hold NaN, or some found no place."""


@dataclasses.dataclass(frozen=True)
class MergeError:
    """What quantizing the merged weights to 4 bits again costs: ‖Q(W + ΔW) - (W + ΔW)‖ / ‖W + ΔW‖."""

    by_layer: dict[str, float]
    total: float


def merge_to_4bit(model: Any) -> tuple[nn.Module, MergeError]:
    """Merges the active adapters of a PEFT model into its 4-bit weights, and drops them.

    Returns:
        The base model, still 4-bit, and the relative error that each layer and all of them together took on.
    """
    by_layer: dict[str, float] = {}
    error = norm = 0.0
    for name, layer in model.named_modules():
        if not isinstance(layer, Over4bit | MergesAnew):
            continue
        if layer.merged_adapters:
            layer.unmerge()
        names = check_adapters_to_merge(layer, None)
        if not names:
            continue
        path = name.removeprefix("base_model.model.")
        if isinstance(layer, MergesAnew):
            exact = layer.merged_weight(names)
            layer.requantize(exact)
            decoded = layer.decoded()
            if layer.parameter_name != "weight":
                path = f"{path.replace('.base_layer', '')}.{layer.parameter_name}"
        else:
            dense = layer.merge_dense(names)
            exact = dense.weight
            layer.set_merged(dense)
            decoded = layer.layer4bit.dequantize(torch.float32)
        layer.merged_adapters.clear()
        difference = (decoded - exact).norm().item() ** 2
        size = exact.norm().item() ** 2
        by_layer[path] = (difference / size) ** 0.5 if size else 0.0
        error, norm = error + difference, norm + size
    base = model.unload()
    return base, MergeError(by_layer, (error / norm) ** 0.5 if norm else 0.0)


def write_base(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Records beside an adapter which 4-bit base it belongs to.

    Of a model that FSDP2 has sharded every rank has to call this, as for ``fingerprint``; the first one writes.
    """
    record = {"fingerprint": fingerprint(model), "format_version": FORMAT_VERSION}
    if _is_sharded(model) and torch.distributed.get_rank() != 0:
        return
    path = pathlib.Path(directory) / BASE_FILE
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def check_base(
    model: nn.Module, directory: str | os.PathLike[str], on_mismatch: OnMismatch | None = None
) -> bool | None:
    """Whether ``model`` is the 4-bit base that the adapter in ``directory`` was trained on.

    Args:
        on_mismatch: "refuse" raises a ValueError, "warn" warns, "ignore" only answers; ``on_base_mismatch`` if None.

    Returns:
        None where the adapter does not say (PEFT alone wrote it) or the model is not 4-bit.

    Raises:
        ValueError: another base, with "refuse"; or the file is damaged or of a newer version.
    """
    path = pathlib.Path(directory) / BASE_FILE
    if not path.is_file() or not _is_4bit(model):
        return None
    record = read_json(path, {"fingerprint": str, "format_version": int})
    if record["format_version"] != FORMAT_VERSION:
        raise FileError(f"{path}: expected format_version {FORMAT_VERSION}, got {record['format_version']}")
    found = fingerprint(model)
    if found == record["fingerprint"]:
        return True
    message = (
        f"{directory}: this adapter was trained on another 4-bit base: expected fingerprint "
        f"{excerpt(record['fingerprint'][:12])}, got {found[:12]}"
    )
    action = on_mismatch or on_base_mismatch
    if action == "refuse":
        raise ValueError(message)
    if action == "warn":
        warnings.warn(message, stacklevel=2)
    return False


def _is_4bit(model: nn.Module) -> bool:
    return any(True for _ in layers_of(model))


def _is_sharded(model: nn.Module) -> bool:
    return any(isinstance(m, Packed4bit) and m.is_sharded for m in model.modules())


def _extend(owner: Any, name: str) -> Any:
    """Replaces ``owner.name`` by the decorated function, which takes the original as its first argument."""
    original = getattr(owner, name)

    def decorate(function: Any) -> Any:
        @functools.wraps(original)
        def extended(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        static = isinstance(owner, type) and isinstance(vars(owner).get(name), staticmethod)
        setattr(owner, name, staticmethod(extended) if static else extended)
        return extended

    return decorate


@_extend(LoraModel, "_create_new_module")
def _create_new_module(original: Any, lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
    if isinstance(target, Linear4bit):
        return LoraLinear4bit(target, adapter_name, config=lora_config, **kwargs)
    over = create_over_weights(target, adapter_name, lora_config, **kwargs)
    return over if over is not None else original(lora_config, adapter_name, target, **kwargs)


def _methods(cls: type[BaseTuner]) -> Iterator[type[BaseTuner]]:
    for method in cls.__subclasses__():
        yield method
        yield from _methods(method)


for _method in set(_methods(BaseTuner)):
    if "_create_and_replace" in vars(_method) and _method is not LoraModel:
        _extend(_method, "_create_and_replace")(create_over_4bit)


@_extend(BaseTuner, "merge_and_unload")
def _merge_and_unload(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    has_4bit = any(isinstance(m, Over4bit | MergesAnew) for m in self.model.modules())
    model = original(self, *args, **kwargs)
    if not has_4bit:
        return model
    # The merged layers are dense: so become those that had no adapter, for the model to be of one kind.
    if getattr(model, "hf_quantizer", None) is not None:
        return model.dequantize()
    from ._modules import dequantize_modules

    return dequantize_modules(model)


def _get_nb_trainable_parameters(original: Any, self: Any) -> tuple[int, int]:
    trainable, total = original(self)
    return trainable, total + hidden_parameters(self)


_extend(PeftModel, "get_nb_trainable_parameters")(_get_nb_trainable_parameters)
_extend(PeftMixedModel, "get_nb_trainable_parameters")(_get_nb_trainable_parameters)


@_extend(peft.utils.loftq_utils, "replace_lora_weights_loftq")
def replace_lora_weights_loftq(original: Any, peft_model: Any, *args: Any, **kwargs: Any) -> Any:
    if any(isinstance(m, LoraLinear4bit) for m in peft_model.modules()):
        return replace_lora_weights(peft_model, *args, **kwargs)
    return original(peft_model, *args, **kwargs)


peft.utils.replace_lora_weights_loftq = peft.replace_lora_weights_loftq = replace_lora_weights_loftq


@_extend(peft.utils.other, "prepare_model_for_kbit_training")
def prepare_model_for_kbit_training(original: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    model = original(model, *args, **kwargs)
    # PEFT turns gradient checkpointing on for the kinds of 4-bit model that it knows.
    if _is_4bit(model) and (args[0] if args else kwargs.get("use_gradient_checkpointing", True)):
        options = (args[1] if len(args) > 1 else kwargs.get("gradient_checkpointing_kwargs")) or {}
        if options.get("use_reentrant", True):
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model


peft.utils.prepare_model_for_kbit_training = prepare_model_for_kbit_training
peft.prepare_model_for_kbit_training = prepare_model_for_kbit_training


@_extend(PeftModel, "save_pretrained")
def _save_pretrained(original: Any, self: Any, save_directory: str, *args: Any, **kwargs: Any) -> Any:
    saved = original(self, save_directory, *args, **kwargs)
    if _is_sharded(self):
        # The fingerprint needs every rank, and a sharded model is usually saved by one.
        warnings.warn(
            f"{save_directory}: the base is sharded, and its fingerprint is not recorded; to record it, call "
            "qlora_ext.integrations.peft.write_base(model, directory) on every rank",
            stacklevel=2,
        )
    elif _is_4bit(self) and kwargs.get("is_main_process", True):
        names = kwargs.get("selected_adapters") or list(self.peft_config)
        for name in names:  # PEFT puts every adapter but the default one into a directory of its own
            directory = pathlib.Path(save_directory) / ("" if name == "default" else name)
            if (directory / "adapter_config.json").is_file():
                write_base(self, directory)
    return saved


def _incomplete(model: Any, adapter: str, result: Any) -> Iterator[str]:
    """What is wrong with an adapter that was just loaded: a sentence each, with a count and a few names."""
    weights = peft.get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    missing = {name.replace(f".{adapter}.", ".") for name in result.missing_keys}  # as they are in the file
    faults = {
        "are missing": missing | {name for name, t in weights.items() if t.is_meta},
        "belong to no layer of the model": set(result.unexpected_keys),
        "hold NaN or infinity": {n for n, t in weights.items() if not t.is_meta and not t.isfinite().all()},
    }
    for fault, names in faults.items():
        if names:
            few = ", ".join(excerpt(name) for name in sorted(names)[:3])
            yield f"{len(names)} weights (of the {len(weights)} that it needs) {fault}, such as {few}"


@_extend(PeftModel, "load_adapter")
def _load_adapter(original: Any, self: Any, model_id: str, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    check_base(self, pathlib.Path(model_id) / (kwargs.get("subfolder") or ""))
    result = original(self, model_id, adapter_name, *args, **kwargs)
    if _is_4bit(self):
        for fault in _incomplete(self, adapter_name, result):
            message = f"the adapter {printable(model_id)} is not whole: {fault}"
            warnings.warn(message, IncompleteAdapterWarning, stacklevel=2)
    return result
