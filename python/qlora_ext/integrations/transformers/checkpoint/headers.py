"""The tensors of safetensors files, and transformers' names for them in a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import core_model_loading

from ....untrusted import FileError, excerpt, printable

# The ends of names that only packed codes have.
_CODES = (".weight_packed", ".qweight", "_blocks")
# What the names of FP8 weights' scales have more.
_SCALES_OF = ("_scale", "_scale_inv")
# Experts that a checkpoint stores one by one, though transformers expects stacks in it. Libraries that quantize gpt-oss
# make linear layers of its experts; for such names of other models, transformers has conversions.
_EXPERT = re.compile(r"(?P<module>.*?\bexperts)(?:\.experts)?\.(?P<number>\d+)\.(?P<layer>\w+)\.(?P<kind>weight|bias)")
_GATE, _UP, _DOWN = ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")
# The names of an expert's layers in checkpoints, by the stack that contains their weights, gate before up.
PARTS = {"gate_up_proj": (_GATE, _UP), "down_proj": (_DOWN,)}


def stack_of(key: str) -> tuple[str, str] | None:
    """The name of the stack that contains an expert's weight or bias, and a pattern of the names of its parts."""
    if (match := _EXPERT.fullmatch(key)) is None:
        return None
    module, layer, kind = match["module"], match["layer"], match["kind"]
    stack = next((name for name, parts in PARTS.items() if any(layer in names for names in parts)), None)
    if stack is None:
        return None
    return f"{module}.{stack}{'_bias' if kind == 'bias' else ''}", f"experts.*.{layer}.{kind}"


def patterns_of(pattern: str) -> list[str] | None:
    """The patterns of all parts of a stack, gate before up, by the pattern of one; None if it is not from here."""
    match = re.fullmatch(r"experts\.\*\.(\w+)\.(weight|bias)", pattern)
    if match is None:
        return None
    layer, kind = match.groups()
    parts = next(parts for parts in PARTS.values() if any(layer in names for names in parts))
    column = next(names.index(layer) for names in parts if layer in names)
    return [f"experts.*.{names[column]}.{kind}" for names in parts]


class Header(NamedTuple):
    """What a file says about a tensor."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def read_headers(files: Sequence[str]) -> dict[str, Header]:
    """The headers of all tensors in safetensors files, by name.

    Raises:
        ValueError: there are no such files, one is damaged, or two have the same tensor.
    """
    found: dict[str, Header] = {}
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        found_files = ", ".join(map(printable, files)) or "none"
        raise ValueError(f"checkpoint: expected safetensors files with packed weights, got {found_files}")
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118  # no mapping
                    if key in found:
                        raise FileError(
                            f"{printable(file)}: expected each tensor in one file, found {excerpt(key, 200)}, which "
                            f"{printable(found[key].file)} has too"
                        )
                    part = opened.get_slice(key)
                    found[key] = Header(file, part.get_dtype(), tuple(part.get_shape()))
        except FileNotFoundError:
            message = "expected this file of the checkpoint, found none; is the download complete?"
            raise FileError(f"{printable(file)}: {message}") from None
        except (OSError, SafetensorError) as error:
            raise FileError(f"{printable(file)}: truncated or damaged: {excerpt(str(error))}") from error
    return found


def check_dense(files: Sequence[str]) -> None:
    """Rejects files with packed codes of other libraries for a model whose configuration does not mention them.

    Raises:
        ValueError: there is such a tensor, or a file is damaged.
    """
    headers = read_headers(files)
    for key, header in headers.items():
        is_scaled = header.dtype.startswith("F8") and any(f"{key}{scale}" in headers for scale in _SCALES_OF)
        if is_scaled or key.endswith(_CODES) or (key.endswith(".weight") and header.dtype in ("U8", "I8", "U32")):
            raise ValueError(
                f"{printable(header.file)}: expected dense weights, because the model's configuration has no "
                f"quantization_config, got the codes {excerpt(key, 200)}; load the model with the config.json "
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
        if target not in self._state and (stack := stack_of(key)) is not None:
            target, pattern = self.place(stack[0])[0], stack[1]
        return (target, pattern) if target in self._state else (None, None)

    def has_values(self, target: str) -> bool:
        """Whether the tensor ``target`` of the model is floating-point."""
        return bool(self._state[target].is_floating_point())

    def converter(self, pattern: str | None) -> tuple[list[Any], list[str]]:
        """The operations of the converter with that pattern, and all its patterns, in order."""
        if pattern is not None and (parts := patterns_of(pattern)) is not None:
            return [core_model_loading.MergeModulelist(0), core_model_loading.Concatenate(1)][: len(parts)], parts
        found = next((c for c in self._converters if pattern in c.source_patterns), None)
        return ([], []) if found is None else (found.operations, found.source_patterns)
