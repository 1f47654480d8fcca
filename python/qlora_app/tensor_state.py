"""Noticing when the tensors of a module are no longer what captured or compiled code reads."""

from __future__ import annotations

import operator
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def _parts_of(t: Any) -> dict[str, Tensor]:
    """The tensors that a wrapper such as a 4-bit weight has as attributes. Other tensors, and DTensors, have none."""
    names = t.__tensor_flatten__()[0] if is_traceable_wrapper_subclass(t) else ()
    return {name: vars(t)[name] for name in names if name in vars(t)}


class TensorState:
    """Which tensors a module has, and where they are.

    Args:
        ids: of the dense tensors that matter; None for all.

    Attributes:
        tensors: the parameters and buffers. A 4-bit weight's own tensors stand for it.
    """

    def __init__(self, module: nn.Module, ids: Container[int] | None = None) -> None:
        held: list[dict[str, Any]] = [entries for m in module.modules() for entries in (m._parameters, m._buffers)]
        places = [(entries, name, t) for entries in held for name, t in entries.items()]
        weights = {id(t): t for *_, t in places if _parts_of(t)}
        places = [place for place in places if ids is None or id(place[2]) in ids or id(place[2]) in weights]
        places += [(vars(w4), name, part) for w4 in weights.values() for name, part in _parts_of(w4).items()]
        self._entries = [entries for entries, *_ in places]
        self._names = [name for _, name, _ in places]
        self._parts: list[Any] = [part for *_, part in places]
        tensors = {id(t): t for t in self._parts if t is not None and id(t) not in weights}
        self.tensors: list[Tensor] = [*tensors.values()]
        self._addresses = self._found_addresses()

    def _found_addresses(self) -> list[int]:
        with torch._C.DisableTorchFunctionSubclass():
            return [*map(Tensor.data_ptr, self.tensors)]

    def is_current(self) -> bool:
        """Whether the tensors and their addresses are the same now. ``model.to`` moves them, an optimizer does not.

        Decoding asks before each token, so the loops run in C where they can.
        """
        return (
            all(map(operator.is_, map(dict.get, self._entries, self._names), self._parts))
            and self._found_addresses() == self._addresses
        )
