"""Noticing when the tensors of a module are no longer what captured or compiled code reads."""

from __future__ import annotations

import operator
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def _parts_of(t: Any) -> dict[str, Tensor]:
    """The tensors that a wrapper such as a 4-bit weight has as attributes. Other tensors, and DTensors, have none."""
    names = t.__tensor_flatten__()[0] if is_traceable_wrapper_subclass(t) else ()
    return {name: vars(t)[name] for name in names if name in vars(t)}


def _holds(module: nn.Module, ids: Container[int]) -> bool:
    """Whether a module or a submodule has one of some tensors."""
    return any(id(t) in ids for m in module.modules() for held in (m._parameters, m._buffers) for t in held.values())


class TensorState:
    """Which tensors a module has, and where they are: in which submodules, and in which memory.

    Args:
        ids: of the dense tensors that matter; None for all.

    Attributes:
        tensors: the parameters and buffers. A 4-bit weight's own tensors stand for it.
    """

    def __init__(self, module: nn.Module, ids: Iterable[int] | None = None) -> None:
        modules = [*module.modules()]
        held: list[dict[str, Any]] = [entries for m in modules for entries in (m._parameters, m._buffers)]
        places = [(entries, name, t) for entries in held for name, t in entries.items()]
        weights = {id(t): t for *_, t in places if _parts_of(t)}
        children: list[Any] = [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        if ids is not None:
            matter = {*ids, *weights}
            places = [place for place in places if id(place[2]) in matter]
            children = [place for place in children if place[2] is not None and _holds(place[2], matter)]
        places += [(vars(w4), name, part) for w4 in weights.values() for name, part in _parts_of(w4).items()]
        places += children
        self._entries = [entries for entries, *_ in places]
        self._names = [name for _, name, _ in places]
        self._parts: list[Any] = [part for *_, part in places]
        tensors = {id(t): t for t in self._parts if isinstance(t, Tensor) and id(t) not in weights}
        self.tensors: list[Tensor] = [*tensors.values()]
        self._addresses = self._found_addresses()

    def _found_addresses(self) -> list[int]:
        with torch._C.DisableTorchFunctionSubclass():
            return [*map(Tensor.data_ptr, self.tensors)]

    def is_current(self) -> bool:
        """Whether submodules, tensors and addresses are the same. ``model.to`` moves tensors, an optimizer does not.

        Decoding asks before each token, so the loops run in C where they can.
        """
        return (
            all(map(operator.is_, map(dict.get, self._entries, self._names), self._parts))
            and self._found_addresses() == self._addresses
        )
