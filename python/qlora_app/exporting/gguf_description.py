"""What a GGUF file says about its model beside the configuration: name, size, license, and how to sample."""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import gguf
import yaml

from ..models.adapted import Adapted
from .modelfile import SAMPLING

# The fields of a model card, and the keys in the file.
_LICENSE = {"license": "license", "license_name": "license.name", "license_link": "license.link"}


def add_description(
    writer: gguf.GGUFWriter,
    adapted: Adapted,
    shapes: Mapping[str, tuple[int, ...]],
    sampling: Mapping[str, int | float],
) -> None:
    """Adds the description of a model to a file.

    Args:
        shapes: of the tensors of the file, by name.
        sampling: from ``modelfile.sampling``.
    """
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(_name(adapted))
    writer.add_size_label(_size(shapes))
    for field, text in _license(adapted.source.directory).items():
        writer.add_string(f"general.{_LICENSE[field]}", text)
    for field, value in sampling.items():
        add = writer.add_int32 if isinstance(value, int) else writer.add_float32
        add(f"general.sampling.{SAMPLING[field][1]}", value)


def _name(adapted: Adapted) -> str:
    name = pathlib.PurePath(adapted.source.name).name
    phi3 = re.search(r"phi-?3", name.lower())
    # llama.cpp does not load a model whose name has these letters without the special tokens of Phi-3.
    return "model" if phi3 and "<|endoftext|>" not in adapted.tokenizer.get_vocab() else name


def _size(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The number of weights in gguf's notation, such as 135M, or 8x7B with experts."""

    def count(shapes: Iterable[tuple[int, ...]]) -> int:
        return sum(map(math.prod, shapes))

    experts = [shape for name, shape in shapes.items() if "_exps." in name]
    number = max((shape[0] for shape in experts), default=0)
    total, in_experts = count(shapes.values()), count(experts)
    found: str = gguf.size_label(total, total - in_experts, in_experts // max(1, number), number)
    return found


def _license(directory: pathlib.Path | None) -> dict[str, str]:
    """The license that the model card of a directory names."""
    try:
        card: dict[str, Any] = gguf.Metadata.load_model_card(directory)
    except (OSError, ValueError, yaml.YAMLError):  # a damaged card is no reason to reject the model
        return {}
    return {field: text for field in _LICENSE if isinstance(text := card.get(field), str)}
