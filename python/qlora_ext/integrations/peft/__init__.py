"""PEFT (>= 0.19): LoRA on ``Linear4bit`` as one fused operator, with PEFT's own adapters, files and switches.

``get_peft_model`` and ``PeftModel.from_pretrained`` put a ``LoraLinear4bit`` on each ``Linear4bit``. PEFT's other
methods run their own code on top of one. This package is imported automatically with PEFT, and
``integrations/_patches.py`` lists what it changes there. In the examples of this package, ``model`` is
``get_peft_model(qlora_ext.quantize_model(llama), LoraConfig(target_modules="all-linear"))``.
"""

from __future__ import annotations

import os
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import peft
from torch import nn

from ...fingerprint import fingerprint
from ...merging.merge import MergeError, merge_calibrated, merge_to_4bit
from ...merging.merge_aware import set_merge_aware
from ...merging.target_format import target_format
from ...untrusted import excerpt, printable
from .._patches import extend
from . import methods as methods
from .adapter_loading import loading
from .base_file import (
    BASE_FILE,
    FORMAT_VERSION,
    is_4bit,
    read_base,
    recorded_dropout,
    recorded_merge_aware,
    write_base,
)
from .experts import set_dropout
from .initial_values import initialize_lora
from .linear import LoraLinear4bit, cast_fused
from .unreached_adapters import inert_adapters

__all__ = [
    "BASE_FILE",
    "FORMAT_VERSION",
    "IncompleteAdapterWarning",
    "LoraLinear4bit",
    "MergeError",
    "OnMismatch",
    "cast_fused",
    "check_base",
    "inert_adapters",
    "initialize_lora",
    "merge_calibrated",
    "merge_to_4bit",
    "on_base_mismatch",
    "set_dropout",
    "set_merge_aware",
    "write_base",
]

OnMismatch = Literal["refuse", "warn", "ignore"]

# The default of ``on_mismatch``: what happens if an adapter was trained on another 4-bit base.
on_base_mismatch: OnMismatch = "warn"


class IncompleteAdapterWarning(UserWarning):
    """A loaded adapter lacks weights, has NaN or infinity, or has weights that belong to no layer of the model."""


def check_base(
    model: nn.Module, directory: str | os.PathLike[str], on_mismatch: OnMismatch | None = None
) -> bool | None:
    """Whether ``model`` is the 4-bit base that the adapter in ``directory`` was trained on.

    Args:
        on_mismatch: "refuse" raises a ValueError, "warn" warns, "ignore" only returns; ``on_base_mismatch`` if None.

    Returns:
        True or False, or None if the adapter has no record (PEFT alone wrote it) or the model is not 4-bit.

    Raises:
        ValueError: the base is another one, with "refuse"; or the record is damaged or of a newer version.

    Example:
        >>> import tempfile
        >>> from qlora_ext.integrations.peft import check_base
        >>> directory = tempfile.mkdtemp()
        >>> model.save_pretrained(directory)
        >>> check_base(model, directory)
        True
    """
    record = read_base(directory) if is_4bit(model) else {}
    if not record:
        return None
    target = target_format(model)
    same_format = target is not None and record.get("merge_aware") == target.name
    found = target.fingerprint if target is not None and same_format else fingerprint(model)
    if found == record["fingerprint"]:
        return True
    message = (
        f"{directory}: this adapter was trained on another 4-bit base: expected fingerprint "
        f"{excerpt(record['fingerprint'][:12])}, got {found[:12]}"
    )
    on_mismatch = on_mismatch or on_base_mismatch
    if on_mismatch == "refuse":
        raise ValueError(message)
    if on_mismatch == "warn":
        warnings.warn(message, stacklevel=2)
    return False


@extend("peft.utils.other:prepare_model_for_kbit_training")
def _prepare_model_for_kbit_training(original: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    model = original(model, *args, **kwargs)
    # PEFT enables gradient checkpointing only for the 4-bit models that it knows.
    known = getattr(model, "is_loaded_in_4bit", False)
    if is_4bit(model) and not known and (args[0] if args else kwargs.get("use_gradient_checkpointing", True)):
        if not hasattr(model, "gradient_checkpointing_enable"):  # diffusers, which needs no input gradients
            model.enable_gradient_checkpointing()
            return model
        options = (args[1] if len(args) > 1 else kwargs.get("gradient_checkpointing_kwargs")) or {}
        if options.get("use_reentrant", True):
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model


def _incomplete(model: Any, adapter: str, result: Any) -> Iterator[str]:
    """The faults of an adapter that was just loaded, one sentence each, with a count and a few names."""
    weights = peft.get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    missing = {name.replace(f".{adapter}.", ".") for name in result.missing_keys}  # as they are in the file
    faults = {
        "are missing": missing | {name for name, t in weights.items() if t.is_meta},
        "belong to no layer of the model": set(result.unexpected_keys),
        "have NaN or infinity": {n for n, t in weights.items() if not t.is_meta and not t.isfinite().all()},
    }
    for fault, names in faults.items():
        if names:
            few = ", ".join(excerpt(name) for name in sorted(names)[:3])
            yield f"{len(names)} weights (of the {len(weights)} that it needs) {fault}, such as {few}"


@extend("peft.peft_model:PeftModel.load_adapter")
def _load_adapter(original: Any, self: Any, model_id: str, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    directory = pathlib.Path(model_id) / (kwargs.get("subfolder") or "")
    check_base(self, directory)
    if not is_4bit(self):
        return original(self, model_id, adapter_name, *args, **kwargs)
    with loading(self):
        result = original(self, model_id, adapter_name, *args, **kwargs)
    lora_dropout = recorded_dropout(directory)
    if lora_dropout is not None:
        set_dropout(self, adapter_name, lora_dropout)
    if aware := recorded_merge_aware(directory):
        set_merge_aware(self, adapter_name=adapter_name, code=aware if isinstance(aware, str) else None)
    for fault in _incomplete(self, adapter_name, result):
        message = f"the adapter {printable(model_id)} is incomplete: {fault}"
        warnings.warn(message, IncompleteAdapterWarning, stacklevel=2)
    return result
