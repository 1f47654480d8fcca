"""Runs a model block by block, so that each block is calibrated on the outputs of the preceding quantized blocks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Disables the KV cache and dropout of a transformers model inside the ``with`` statement."""
    config, was_training = getattr(model, "config", None), model.training
    before = getattr(config, "use_cache", None)
    if before is not None:
        config.use_cache = False  # type: ignore[union-attr]
    model.eval()
    try:
        yield
    finally:
        if before is not None:
            config.use_cache = before  # type: ignore[union-attr]
        model.train(was_training)


def forward(model: nn.Module, batch: Any) -> None:
    """Runs one batch: a tensor, a tuple of positional inputs, or a mapping of named ones."""
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple):
        model(*batch)
    else:
        model(batch)


def stacks_of(model: nn.Module, layers: Iterable[str]) -> dict[str, nn.ModuleList]:
    """The outermost lists of blocks that contain the named layers, such as ``model.layers``, by name."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1}
    found: dict[str, nn.ModuleList] = {}
    for layer in layers:
        parts = layer.split(".")
        for i in range(1, len(parts)):
            name = ".".join(parts[:i])
            if name in lists:
                found.setdefault(name, lists[name])
                break
    return found


@dataclasses.dataclass
class _Call:
    """The arguments of a call of a block, without the hidden states, which are ``args[0]`` or a keyword."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: bool

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        if self.named:
            out = _hidden(block(*self.args, hidden_states=hidden, **self.kwargs))
        else:
            out = _hidden(block(hidden, *self.args, **self.kwargs))
        assert isinstance(out, Tensor)
        return out


def _hidden(out: Any) -> Any:
    return out[0] if isinstance(out, (tuple, list)) else out


class Stack:
    """A list of blocks, and the recorded calls with which they can be run again one by one.

    Attributes:
        chained: whether each block takes the output of the one before. Otherwise blocks cannot run one by one.
        at: the number of the current block.
        hidden: for each batch, the hidden states that enter block ``at``.
        dense: the same in the dense model, for the block whose number is ``dense_at``; empty if nobody needs them.
    """

    def __init__(self, name: str, blocks: nn.ModuleList) -> None:
        self.name, self.blocks = name, blocks
        self.chained, self.at = True, 0
        self.hidden: list[Tensor] = []
        self.dense: list[Tensor] = []
        self.dense_at = 0
        self._calls: list[list[_Call]] = [[] for _ in blocks]
        self._last: Any = None

    def watch(self) -> list[Any]:
        """Registers hooks that record every call of every block. The caller removes them after the run."""
        handles = []
        for i, block in enumerate(self.blocks):
            handles.append(block.register_forward_pre_hook(self._before(i), with_kwargs=True))
            handles.append(block.register_forward_hook(self._after))
        return handles

    def _before(self, i: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = not args
            hidden = kwargs.get("hidden_states") if named else args[0]
            if not isinstance(hidden, Tensor) or (i > 0 and hidden is not self._last):
                self.chained = False
                return
            rest = {key: value for key, value in kwargs.items() if not (named and key == "hidden_states")}
            self._calls[i].append(_Call(args[1:], rest, named))
            if i == 0:
                self.hidden.append(hidden)

        return see

    def _after(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        self._last = _hidden(out)

    def finish_watching(self, batches: int, with_dense: bool) -> None:
        """Sets ``chained`` to False unless each block was called once per batch.

        Args:
            with_dense: whether ``advance_dense`` will be called.
        """
        self._last = None
        self.chained &= all(len(calls) == batches for calls in self._calls)
        if not self.chained:
            self.hidden, self._calls = [], []
        if with_dense:
            self.dense = list(self.hidden)

    @torch.no_grad()
    def run(self, before_batch: Callable[[], None]) -> None:
        """Runs all batches through block ``at`` and discards its outputs."""
        for call, hidden in zip(self._calls[self.at], self.hidden, strict=True):
            before_batch()
            call(self.blocks[self.at], hidden)

    @torch.no_grad()
    def advance_dense(self) -> None:
        """Moves the dense model's hidden states on to the next block. Block ``dense_at`` must still be dense."""
        for i, call in enumerate(self._calls[self.dense_at]):
            self.dense[i] = call(self.blocks[self.dense_at], self.dense[i])
        self.dense_at += 1

    def losses(self, token_masks: Sequence[Tensor | None]) -> list[Callable[[], Tensor]]:
        """For each batch, the relative squared error of the outputs of block ``at``, on the quantized model's inputs.

        They are compared with the dense model's, which ``advance_dense`` must just have moved past this block.

        Args:
            token_masks: for each batch, which tokens count, bool [B, T]; None for all.
        """

        def loss(call: _Call, hidden: Tensor, wanted: Tensor, mask: Tensor | None) -> Tensor:
            found, exact = call(self.blocks[self.at], hidden).float(), wanted.float()
            error = (found - exact).square().sum(-1) / exact.square().sum(-1).clamp_min(1e-12)
            return error.mean() if mask is None or mask.shape != error.shape else error[mask.to(error.device)].mean()

        batches = zip(self._calls[self.at], self.hidden, self.dense, token_masks, strict=True)
        return [functools.partial(loss, *batch) for batch in batches]

    @torch.no_grad()
    def advance(self) -> None:
        """Moves on to the next block, whose inputs are the outputs of block ``at`` as it is now, that is, quantized."""
        for i, call in enumerate(self._calls[self.at]):
            self.hidden[i] = call(self.blocks[self.at], self.hidden[i])
        self._calls[self.at] = []
        self.at += 1
