"""Experts that a checkpoint stores one by one, though the model has stacks of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import core_model_loading

from ....checkpoints.rows import alternating_rows, grouped_rows
from ....untrusted import excerpt, printable
from .headers import PARTS, Header, Names, patterns_of
from .stored_weights import in_order_of_reading


def alternates(experts: nn.Module) -> bool:
    """Whether rows of gate and up alternate in the module's gate_up_proj."""
    return not getattr(experts, "is_concatenated", True)


_EXPERT = re.compile(r".*\bexperts\.(?P<number>\d+)\.(?P<layer>\w+)\.weight")


def layers_of_experts(model: nn.Module, stack: str, shape: Sequence[int]) -> list[list[str]]:
    """The linear layers as which checkpoints store a stack of experts' matrices, by transformers' conversion.

    Without a conversion, they have the names that libraries give to the layers when they quantize the model.

    Args:
        model: a transformers model.
        stack: the name of the stack in it.
        shape: of the stack, [E, N, K].

    Returns:
        For each expert the names of its layers in the model, gate before up.

    Raises:
        ValueError: transformers converts the stack to other tensors.
    """
    experts, _, name = stack.rpartition(".")
    count, rows, _ = shape
    numbers = torch.arange(count * rows, dtype=torch.int64, device="cpu").view(count, rows, 1).expand(-1, -1, 2)
    if getattr(model.get_submodule(experts), "is_transposed", False):
        numbers = numbers.transpose(1, 2)
    found = core_model_loading.revert_weight_conversion(model, {stack: numbers})
    if name in PARTS and [part.shape for part in found.values()] == [numbers.shape]:
        return [[f"{experts}.{e}.{names[0]}" for names in PARTS[name]] for e in range(count)]
    layers: dict[int, list[str]] = {}
    at = 0
    for key in sorted(found, key=lambda key: int(found[key].min())):
        match, part = _EXPERT.fullmatch(key), found[key]
        if (
            match is None
            or part.ndim != 2
            or int(match["number"]) != at // rows
            or part[:, 0].tolist() != [*range(at, at + len(part))]
        ):
            break
        layers.setdefault(at // rows, []).append(f"{experts}.{match['number']}.{match['layer']}")
        at += len(part)
    if at != count * rows:
        raise ValueError(f"{stack}: expected experts that checkpoints store one by one, got {', '.join([*found][:3])}")
    return [*layers.values()]


@dataclasses.dataclass
class DenseExperts:
    """A stack of dense weights or biases of the model, which the checkpoint stores expert by expert.

    Attributes:
        parts: the names of an expert's tensors in the checkpoint, gate before up, for each expert.
        alternates: whether the rows of gate and up alternate in the model.
        is_transposed: whether the model stores the transpose of each matrix.
        where: the file and the name of the first tensor, for messages.
    """

    parts: list[list[str]]
    alternates: bool
    is_transposed: bool
    where: str

    @property
    def names(self) -> list[str]:
        """The names of all tensors in the checkpoint, in the order in which transformers reads them."""
        return in_order_of_reading(key for keys in self.parts for key in keys)

    def read(self, by_key: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The stack.

        Raises:
            ValueError: a tensor has another shape than the model expects.
        """
        _, *rest = shape
        rows, *columns = reversed(rest) if self.is_transposed else rest
        expected = torch.Size((rows // len(self.parts[0]), *columns))
        for key, t in by_key.items():
            if t.shape != expected:
                raise ValueError(
                    f"{self.where}: expected {excerpt(key, 200)} to be {list(expected)}, got {list(t.shape)}"
                )
        out = torch.empty(tuple(shape), dtype=dtype, device=next(iter(by_key.values())).device)
        order = alternating_rows(rows, out.device) if self.alternates else slice(None)
        for matrix, keys in zip(out.transpose(1, 2) if self.is_transposed else out, self.parts, strict=True):
            matrix.copy_(torch.cat([by_key[key] for key in keys])[order])
        return out

    def write(self, values: Tensor) -> dict[str, Tensor]:
        """The tensors of the checkpoint."""
        stack = values.transpose(1, 2) if self.is_transposed else values
        order = grouped_rows(stack.shape[1], stack.device) if self.alternates else slice(None)
        return {
            key: t.contiguous()
            for matrix, keys in zip(stack, self.parts, strict=True)
            for key, t in zip(keys, matrix[order].chunk(len(keys)), strict=True)
        }


def dense_experts(model: nn.Module, names: Names, headers: Mapping[str, Header]) -> dict[str, DenseExperts]:
    """The dense stacks of ``model`` whose experts the checkpoint stores one by one, by their names in it.

    Args:
        headers: of the tensors that belong to no 4-bit weight.

    Raises:
        ValueError: an expert is missing.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for key in headers:
        target, pattern = names.place(key)
        if target is not None and pattern is not None and patterns_of(pattern) is not None:
            found.setdefault(target, {}).setdefault(pattern, []).append(key)
    return dict(_joined(model, found, headers))


def _joined(
    model: nn.Module, found: Mapping[str, Mapping[str, Collection[str]]], headers: Mapping[str, Header]
) -> Iterator[tuple[str, DenseExperts]]:
    for target, by_pattern in found.items():
        module_name, _, name = target.rpartition(".")
        module, first = model.get_submodule(module_name), min(min(keys) for keys in by_pattern.values())
        where = f"{printable(headers[first].file)}: {excerpt(first, 200)}"
        count, columns = len(getattr(module, name)), []
        patterns = patterns_of(next(iter(by_pattern))) or []
        if surplus := [pattern for pattern in by_pattern if pattern not in patterns]:
            raise ValueError(f"{where}: expected one name for each tensor, found names like {', '.join(surplus)} too")
        for pattern in patterns:
            keys = in_order_of_reading(by_pattern.get(pattern, ()))
            if len(keys) != count:
                raise ValueError(f"{where}: expected {count} tensors with names like {pattern}, found {len(keys)}")
            columns.append(keys)
        yield (
            target,
            DenseExperts(
                parts=[list(keys) for keys in zip(*columns, strict=True)],
                alternates=len(columns) > 1 and alternates(module),
                is_transposed=not name.endswith("_bias") and bool(getattr(module, "is_transposed", False)),
                where=where,
            ),
        )
