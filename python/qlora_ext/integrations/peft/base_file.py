"""``qlora_base.json``: records next to an adapter its 4-bit base, and settings that PEFT's files cannot express."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ...atomic import staged_file
from ...fingerprint import fingerprint
from ...formats import READ_IN, SERVED_FORMATS
from ...merging.merge_aware import merge_aware_format
from ...merging.target_format import target_format
from ...nn import Packed4bit, layers_of
from ...untrusted import FileError, Schema, excerpt, read_json
from .._patches import extend

BASE_FILE = "qlora_base.json"
FORMAT_VERSION = 1
_SCHEMA: Schema = {
    "fingerprint": str,
    "format_version": int,
    "lora_dropout?": float,
    "merge_aware?": (bool, str),
    "base_format?": str,
    "requantized?": bool,
}


def is_4bit(model: nn.Module) -> bool:
    """Whether ``model`` has 4-bit layers."""
    return any(True for _ in layers_of(model))


def _is_sharded(model: nn.Module) -> bool:
    return any(isinstance(m, Packed4bit) and m.is_sharded for m in model.modules())


def _unsaved_dropout(config: Any) -> float:
    """The dropout that PEFT's file must not contain, because PEFT rejects dropout on parameters; 0 if there is none."""
    return getattr(config, "lora_dropout", 0.0) if getattr(config, "target_parameters", None) else 0.0


def _config_of(model: nn.Module) -> Any:
    """The quantization config of the base; None if it has none."""
    base: Any = model
    if hasattr(base, "get_base_model"):  # PEFT's model
        base = base.get_base_model()
    return getattr(getattr(base, "config", None), "quantization_config", None)


def write_base(model: nn.Module, directory: str | os.PathLike[str], adapter: str = "default") -> None:
    """Writes ``qlora_base.json`` next to an adapter: the fingerprint of its 4-bit base, and settings PEFT cannot save.

    For a model that FSDP2 has sharded, every rank has to call this, as for ``fingerprint``. The first rank writes.
    """
    aware, target = merge_aware_format(model, adapter), target_format(model)
    base = target.fingerprint if aware and target is not None else fingerprint(model)
    record: dict[str, Any] = {"fingerprint": base, "format_version": FORMAT_VERSION}
    lora_dropout = _unsaved_dropout(getattr(model, "peft_config", {}).get(adapter))
    if lora_dropout:
        record["lora_dropout"] = lora_dropout
    if aware:
        record["merge_aware"] = aware
    config = _config_of(model)
    if read_in := getattr(config, "served", None):
        record["base_format"] = read_in
    if getattr(config, "requantize", False):
        record["requantized"] = True
    if _is_sharded(model) and torch.distributed.get_rank() != 0:
        return
    with staged_file(pathlib.Path(directory) / BASE_FILE) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_base(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The record of the adapter in ``directory``; empty if it has none.

    Raises:
        ValueError: a value is invalid, or the file is damaged or of a newer version.
    """
    path = pathlib.Path(directory) / BASE_FILE
    if not path.is_file():
        return {}
    record: dict[str, Any] = read_json(path, _SCHEMA)
    if record["format_version"] != FORMAT_VERSION:
        raise FileError(f"{path}: expected format_version {FORMAT_VERSION}, got {record['format_version']}")
    p, aware, read_in = (record.get(name) for name in ("lora_dropout", "merge_aware", "base_format"))
    if p is not None and not 0.0 <= p <= 1.0:
        raise FileError(f"{path}: expected a probability from 0 to 1 as lora_dropout, got {p}")
    if isinstance(aware, str) and aware and aware not in SERVED_FORMATS:
        raise FileError(f"{path}: expected merge_aware to be {', '.join(SERVED_FORMATS)} or true, got {excerpt(aware)}")
    if read_in not in (None, *READ_IN):
        raise FileError(f"{path}: expected base_format to be {', '.join(READ_IN)}, got {excerpt(str(read_in))}")
    return record


def recorded_dropout(directory: str | os.PathLike[str]) -> float | None:
    """The dropout of the adapter in ``directory`` if ``write_base`` recorded one, else None."""
    return read_base(directory).get("lora_dropout")


def recorded_merge_aware(directory: str | os.PathLike[str]) -> str | bool:
    """The format for which the adapter in ``directory`` was trained merge-aware; True for the base's own."""
    return read_base(directory).get("merge_aware") or False


def recorded_base_format(directory: str | os.PathLike[str]) -> str | None:
    """``QLoRAConfig.served`` of the base on which the adapter in ``directory`` was trained; None for NF4."""
    return read_base(directory).get("base_format")


def recorded_requantized(directory: str | os.PathLike[str]) -> bool:
    """``QLoRAConfig.requantize`` of the base on which the adapter in ``directory`` was trained."""
    return bool(read_base(directory).get("requantized"))


@contextlib.contextmanager
def _without_unsaved_dropout(configs: Iterable[Any]) -> Iterator[None]:
    """Sets the dropout of adapters on experts to 0 while they are saved, because PEFT could not load it."""
    unsaved = [(config, p) for config in configs if (p := _unsaved_dropout(config))]
    for config, _ in unsaved:
        config.lora_dropout = 0.0
    try:
        yield
    finally:
        for config, p in unsaved:
            config.lora_dropout = p


@extend("peft.peft_model:PeftModel.save_pretrained")
def _save_pretrained(original: Any, self: Any, save_directory: str, *args: Any, **kwargs: Any) -> Any:
    with _without_unsaved_dropout(self.peft_config.values()):
        saved = original(self, save_directory, *args, **kwargs)
    if _is_sharded(self):
        # The fingerprint needs every rank, but usually only one rank saves.
        warnings.warn(
            f"{save_directory}: the base is sharded, and its fingerprint is not recorded; to record it, call "
            "qlora_ext.integrations.peft.write_base(model, directory) on every rank",
            stacklevel=2,
        )
    elif is_4bit(self) and kwargs.get("is_main_process", True):
        names = kwargs.get("selected_adapters") or list(self.peft_config)
        for name in names:  # PEFT writes each adapter into its own subdirectory, except the default one
            directory = pathlib.Path(save_directory) / ("" if name == "default" else name)
            if (directory / "adapter_config.json").is_file():
                write_base(self, directory, name)
    return saved
