"""Reports how much of a model's linear weights is 4-bit, and why the rest is not."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..weight import Weight4bit
from .conversions import conversion_of
from .dense_modules import dense_modules, paths_to
from .embedding import Embedding4bit, TiedLinear4bit
from .experts import is_fused_experts
from .packed import Packed4bit

# The share of the linear weights that may stay dense without a warning.
_TOLERATED_SHARE = 0.01
# Names of matrix parameters outside linear layers: in fused attention, experts, routers and recurrent cells.
_MATRIX = re.compile(r"(^|_)(weight|proj|w\d*)($|_)")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a dotted name
_NO_MATRIX = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How many elements of a model's linear weights are quantized or dense.

    Attributes:
        quantized: the number of 4-bit elements.
        dense: the number of dense elements by the full name of the module, without those in ``by_request``.
        by_request: the same for modules that were meant to stay dense: output heads, towers, and those the caller
            named.
        reasons: why each module in ``dense`` is dense, by its name.
    """

    quantized: int
    dense: dict[str, int]
    by_request: dict[str, int]
    reasons: dict[str, str]

    @property
    def share(self) -> float:
        """The fraction of the weights that is 4-bit, from 0 to 1. Weights in ``by_request`` are not counted."""
        total = self.quantized + sum(self.dense.values())
        return self.quantized / total if total else 0.0

    @property
    def exceeds_tolerance(self) -> bool:
        """Whether more than 1% of the weights stayed dense without being requested to."""
        return bool(self.dense) and 1 - self.share > _TOLERATED_SHARE

    def __str__(self) -> str:
        if not self.dense:
            return f"{self.share:.1%} of the linear weights are quantized"
        return f"{self.share:.1%} of the linear weights are quantized; dense are {_listed(self.dense, self.reasons)}"


def _listed(dense: dict[str, int], reasons: dict[str, str]) -> str:
    """The names of the modules in ``dense``, the largest first. Modules whose names differ in numbers are one entry."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in dense:
        groups.setdefault((_NUMBER.sub("*", name), reasons[name]), []).append(name)
    largest = sorted(groups.items(), key=lambda group: -sum(dense[name] for name in group[1]))
    shown = [f"{_joined(names)} ({why})" for (_, why), names in largest[:3]]
    return ", ".join(shown) + (f" and {len(largest) - 3} more" if len(largest) > 3 else "")


def _joined(names: list[str]) -> str:
    """Names that differ in numbers as one: layers.{0-2,5}.up_proj."""
    columns = [sorted(set(map(int, column))) for column in zip(*map(_NUMBER.findall, names), strict=True)]
    texts = iter([str(c[0]) if len(c) == 1 else f"{{{_ranges(c)}}}" for c in columns])
    some = "" if len(names) == math.prod(map(len, columns)) else f"{len(names)} of "  # not every combination
    return some + _NUMBER.sub(lambda _: next(texts), names[0])


def _ranges(numbers: list[int]) -> str:
    """Rising numbers as text: 0-2,5."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Each module of ``model`` that has dense linear weights of its own: name, module, number of elements."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, module in model.named_modules():
        if isinstance(module, (Packed4bit, *_NO_MATRIX)):
            continue
        known = conversion_of(module) is not None or isinstance(module, nn.Linear) or is_fused_experts(module)
        matrices = [
            p
            for key, p in module._parameters.items()
            if p is not None and p.is_floating_point() and p.ndim in (2, 3) and id(p) not in tables
            if not isinstance(p, Weight4bit)
            if known or (_MATRIX.search(key) and min(p.shape) > 1)
        ]
        if is_parametrized(module, "weight"):
            matrices += [p for p in module.parametrizations.weight.parameters() if p.ndim == 2]
        if matrices:
            yield name, module, sum(p.numel() for p in matrices)


def _reason(module: nn.Module, name: str, always: set[str]) -> str:
    if not always.isdisjoint(paths_to(name)):
        return "its library keeps it in float32, or computes with its weight"
    if isinstance(module, nn.Linear) and "weight" not in module._parameters:
        return "its weight is computed from other parameters"
    if conversion_of(module) is not None or is_fused_experts(module):
        return "left out"
    return f"a {type(module).__name__}, for which there is no 4-bit layer"


def coverage(model: nn.Module, asked: Iterable[str] = ()) -> Coverage:
    """Counts how much of the linear weights of ``model`` is 4-bit, and says why the rest is not.

    Linear weights are those of linear layers, fused experts and other modules that hold matrices, such as routers;
    embeddings, convolutions and output heads tied to an embedding are not counted.

    Args:
        asked: full names of modules that the caller wants dense, in addition to output heads and towers.

    Example:
        >>> import torch, qlora_ext
        >>> model = torch.nn.ModuleDict({"body": torch.nn.Linear(64, 64), "lm_head": torch.nn.Linear(64, 8)})
        >>> found = qlora_ext.nn.coverage(qlora_ext.quantize_model(model))
        >>> found.share, found.dense, found.by_request
        (1.0, {}, {'lm_head': 512})
    """
    dense_parts = dense_modules(model)
    requested, always = {*dense_parts.heads, *dense_parts.towers, *asked}, {*dense_parts.always}
    shapes = [
        shape
        for m in model.modules()
        if isinstance(m, Packed4bit) and not isinstance(m, Embedding4bit | TiedLinear4bit)
        for shape in m.packed_shapes.values()
    ]
    others = (m for m in model.modules() if isinstance(m, nn.Linear) and not isinstance(m, Packed4bit))
    shapes += [m.weight.shape for m in others if isinstance(m._parameters.get("weight"), Weight4bit)]
    dense: dict[str, int] = {}
    by_request: dict[str, int] = {}
    reasons: dict[str, str] = {}
    for name, module, count in _matrices(model):
        if requested.isdisjoint(paths_to(name)):
            dense[name], reasons[name] = count, _reason(module, name, always)
        else:
            by_request[name] = count
    return Coverage(sum(map(math.prod, shapes)), dense, by_request, reasons)


def report_coverage(model: nn.Module, asked: Iterable[str] = (), stacklevel: int = 3) -> None:
    """Warns if more than 1% of the linear weights of a 4-bit model stayed dense without being requested to."""
    found = coverage(model, asked)
    if found.exceeds_tolerance:
        warnings.warn(f"{type(model).__name__}: {found}; qlora_ext.nn.coverage lists them", stacklevel=stacklevel)


def check_something_is_4bit(model: nn.Module, chosen: bool, asked: Iterable[str] = ()) -> None:
    """Rejects a model in which no layer would be 4-bit.

    Args:
        chosen: whether layers are about to be quantized.

    Raises:
        ValueError: no layer is chosen, and none is 4-bit already.
    """
    if chosen or any(isinstance(m, Packed4bit) for m in model.modules()):
        return
    found, what = coverage(model, asked), type(model).__name__
    if found.dense:
        why = f"its linear weights stay dense: {_listed(found.dense, found.reasons)}"
    elif found.by_request:
        why = f"its linear layers are to stay dense: {', '.join([*found.by_request][:3])}"
    else:
        why = "it has no linear layers"
    raise ValueError(f"model: expected linear layers that can be 4-bit, got a {what} without any: {why}")
