"""The tensors of safetensors files, and transformers' names for them in a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import core_model_loading

from ..._internal.untrusted import FileError, excerpt, printable

# The ends of names that only 4-bit codes have.
_CODES = (".weight_packed", ".qweight", "_blocks")


class Header(NamedTuple):
    """What a file says about a tensor."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def read_headers(files: Sequence[str]) -> dict[str, Header]:
    """The headers of all tensors in safetensors files, by name.

    Raises:
        ValueError: there are no such files, or one is damaged.
    """
    found: dict[str, Header] = {}
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        found_files = ", ".join(map(printable, files)) or "none"
        raise ValueError(f"checkpoint: expected safetensors files with 4-bit weights, got {found_files}")
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118  # no mapping
                    part = opened.get_slice(key)
                    found[key] = Header(file, part.get_dtype(), tuple(part.get_shape()))
        except FileNotFoundError:
            message = "expected this file of the checkpoint, found none; is the download complete?"
            raise FileError(f"{printable(file)}: {message}") from None
        except (OSError, SafetensorError) as error:
            raise FileError(f"{printable(file)}: truncated or damaged: {excerpt(str(error))}") from error
    return found


def check_dense(files: Sequence[str]) -> None:
    """Rejects files with 4-bit codes of other libraries for a model whose configuration does not mention them.

    Raises:
        ValueError: there is such a tensor, or a file is damaged.
    """
    for key, header in read_headers(files).items():
        if key.endswith(_CODES) or (key.endswith(".weight") and header.dtype == "U8"):
            raise ValueError(
                f"{printable(header.file)}: expected dense weights, because the model's configuration has no "
                f"quantization_config, got the 4-bit codes {excerpt(key, 200)}; load the model with the config.json "
                "and the class that belong to its files"
            )


def map_tensors(headers: Mapping[str, Header]) -> dict[str, Tensor]:
    """The tensors with those names, mapped from their files: they take no memory until they are read."""
    by_file: dict[str, list[str]] = {}
    for key, header in headers.items():
        by_file.setdefault(header.file, []).append(key)
    found: dict[str, Tensor] = {}
    for file, keys in by_file.items():
        with safe_open(file, framework="pt") as opened:
            found |= {key: opened.get_tensor(key) for key in keys}
    return found


class Names:
    """transformers' names in ``model`` for the tensors of its checkpoints."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        entries: Any = get_model_conversion_mapping(model)
        self._renamings = [e for e in entries if isinstance(e, core_model_loading.WeightRenaming)]
        self._converters = [e for e in entries if isinstance(e, core_model_loading.WeightConverter)]
        self._state, self._prefix = model.state_dict(), model.base_model_prefix
        self._places: dict[str, tuple[str | None, str | None]] = {}

    def place(self, key: str) -> tuple[str | None, str | None]:
        """The name of a tensor in the model, None if it has none, and the pattern of a converter that makes it."""
        if key not in self._places:
            self._places[key] = self._place(key)
        return self._places[key]

    def _place(self, key: str) -> tuple[str | None, str | None]:
        target, pattern = core_model_loading.rename_source_key(
            key, self._renamings, self._converters, self._prefix, self._state
        )
        if target not in self._state and key in self._state:
            target, pattern = key, None
        return target if target in self._state else None, pattern

    def has_values(self, target: str) -> bool:
        """Whether the tensor ``target`` of the model is floating-point."""
        return bool(self._state[target].is_floating_point())

    def converter(self, pattern: str | None) -> tuple[list[Any], list[str]]:
        """The operations of the converter with that pattern, and all its patterns, in order."""
        found = next((c for c in self._converters if pattern in c.source_patterns), None)
        return ([], []) if found is None else (found.operations, found.source_patterns)
