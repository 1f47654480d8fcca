"""Undoes what training one adapter changes in the base and in this process, for the next adapter."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from typing import Any


class _Attributes:
    """The attributes of an object. Those that are containers are restored in place, because handles refer to them."""

    def __init__(self, owner: Any) -> None:
        self._owner, self._class = owner, owner.__class__
        self._values = dict(vars(owner))
        containers: list[Any] = [value for value in self._values.values() if isinstance(value, dict | list | set)]
        self._contents = [(container, container.copy()) for container in containers]

    def restore(self) -> None:
        self._owner.__class__ = self._class
        for container, content in self._contents:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        vars(self._owner).clear()
        vars(self._owner).update(self._values)


@contextlib.contextmanager
def restored(model: Any) -> Iterator[None]:
    """Undoes, at the end of the ``with`` statement, all changes to the modules of ``model`` and their configurations.

    Such changes are adapters, trained copies of modules, hooks, replaced methods, flags such as gradient checkpointing,
    and ``requires_grad``. PEFT's own ``unload`` would keep some of them. The values of tensors are not restored,
    because adapters never change those of their base.
    """
    from transformers import GenerationConfig, PretrainedConfig

    modules = list(model.modules())
    configs = [v for m in modules for v in vars(m).values() if isinstance(v, GenerationConfig | PretrainedConfig)]
    states = [_Attributes(owner) for owner in (*modules, *{id(config): config for config in configs}.values())]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for state in states:
            state.restore()
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None
        gc.collect()  # adapters and the state of optimizers are in reference cycles


@contextlib.contextmanager
def optimizer_overrides() -> Iterator[None]:
    """Gives the optimizers in the ``with`` statement overrides of their own in bitsandbytes' global manager.

    The manager identifies parameters by their positions and addresses, so the overrides of one optimizer also apply to
    parameters of others.
    """

    def manager() -> Any:
        optim = sys.modules.get("bitsandbytes.optim")
        return None if optim is None else optim.GlobalOptimManager.get_instance()

    before = None
    if (found := manager()) is not None:
        before = dict(vars(found))
        found.initialize()
    try:
        yield
    finally:
        if (found := manager()) is not None:
            found.initialize()
            vars(found).update(before or {})
