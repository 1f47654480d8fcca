"""CUDA graphs of work that repeats: capturing and replaying it, and noticing when a module is no longer as captured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _global

from qlora_ext.untrusted import first_line

from .tensor_state import TensorState


class GraphCache:
    """Runs functions, and captures those that are called again in CUDA graphs.

    The functions take no arguments, and read and write tensors that stay where they are. Functions with the same key do
    the same work. The first call runs the function on a side stream, which is the warm-up that a capture needs. The
    second call captures it and replays the graph, as all later calls do. All graphs share one memory pool, because the
    intermediate results of two graphs are never needed at the same time.

    Attributes:
        failure: why a capture failed; None if none has failed. After a failure, all functions run eagerly.
    """

    def __init__(self, device: torch.device) -> None:
        self.failure: str | None = None
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._warm: set[Hashable] = set()
        self._failed: torch.cuda.CUDAGraph | None = None
        self.clear()

    def __len__(self) -> int:
        """The number of graphs."""
        return len(self._graphs)

    def clear(self) -> None:
        """Deletes all graphs and frees their memory."""
        self._graphs.clear()
        self._warm.clear()
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, key: Hashable, function: Callable[[], object]) -> None:
        """Does the work of ``function`` in torch's current stream."""
        if self.failure is None and key in self._warm and key not in self._graphs:
            self._capture(key, function)
        if key in self._graphs:
            self._graphs[key].replay()
        elif self.failure is not None:
            function()
        else:
            self._warm_up(function)
            self._warm.add(key)

    def _warm_up(self, function: Callable[[], object]) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            function()
        current.wait_stream(self._stream)

    def _capture(self, key: Hashable, function: Callable[[], object]) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            self._record(graph, self._pool, function)
        except Exception as error:  # models may raise any exception
            self.failure = self.failure or first_line(error)
            self._failed = graph
            self._recover()
            self.clear()
        else:
            self._graphs[key] = graph

    def _record(self, graph: torch.cuda.CUDAGraph, pool: Any, function: Callable[[], object]) -> None:
        # torch.cuda.graph leaves its stream current if the capture fails; the outer context does not. With
        # "thread_local", other threads may go on using CUDA.
        with (
            torch.cuda.stream(self._stream),
            torch.cuda.graph(graph, pool, self._stream, capture_error_mode="thread_local"),
        ):
            try:
                function()
            except Exception as error:  # the end of the capture raises another one, which does not say why
                self.failure = self.failure or first_line(error)
                raise

    def _recover(self) -> None:
        """Resets what torch leaves in the state of a capture when the capture fails.

        The allocator goes on asking the failed graph (``_failed``) which memory belongs to the pool. The random
        generator rejects all draws outside of captures, until the next capture succeeds.
        """
        with contextlib.suppress(RuntimeError):  # raised if torch has ended the capture and has released the pool
            torch._C._cuda_endAllocateToPool(self._device.index or 0, self._pool)
            torch._C._cuda_releasePool(self._device.index or 0, self._pool)
        with contextlib.suppress(RuntimeError):
            self._record(torch.cuda.CUDAGraph(), None, lambda: torch.zeros(1, dtype=torch.int8, device=self._device))


class ModuleState(TensorState):
    """What a captured forward of ``module`` depends on, beside the values in its tensors.

    Attributes:
        hooks: the functions that the module and its submodules call before and after their forwards.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        modules = [*module.modules()]
        self._hooks: list[dict[int, Any]] = [_global._global_forward_pre_hooks, _global._global_forward_hooks]
        self._hooks += [hooks for m in modules for hooks in (m._forward_pre_hooks, m._forward_hooks)]
        self._hooks_found = self._present()
        self.hooks = [hook for hooks in self._hooks_found for hook in hooks.values()]
        self._modules = modules
        self._modes = self._training()

    def _present(self) -> list[dict[int, Any]]:
        return [dict(hooks) for hooks in filter(None, self._hooks)]

    def _training(self) -> list[bool]:
        return [m.training for m in self._modules]

    @property
    def is_training(self) -> bool:
        """Whether the module or a submodule is in training mode."""
        return any(self._modes)

    def is_current(self) -> bool:
        """Whether submodules, tensors, their addresses, hooks and modes are the same now.

        It takes 0.2 ms per thousand modules.
        """
        return super().is_current() and self._present() == self._hooks_found and self._training() == self._modes
