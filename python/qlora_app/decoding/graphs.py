"""CUDA graphs of the step of a ``BatchDecoder``. A replay is one launch, the model's own forward dozens per layer.

There is one graph per number of rows and span. Both are rounded up, so that few graphs are needed:

    rows   1, 2, 4, ... and the number of slots
    span   64, 128, 256, ... and the capacity of the caches

A row without a sequence reads token 0 at position 0 of a free slot, which the next prompt in that slot overwrites. A
replay reads the weights from memory, so it sees what an optimizer writes there. If anything else changes
(``ModuleState``, ``FixedAdapters``), the graphs are deleted and captured again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cuda_graphs import GraphCache, ModuleState
from .fixed import FixedAdapters
from .packages import not_traceable
from .prepare import as_matrix
from .step import SPAN_STEP, EagerStep, visible_tokens


def _sizes(least: int, most: int) -> list[int]:
    """``least`` and its doubles below ``most``, then ``most``."""
    sizes = []
    while least < most:
        sizes.append(least)
        least *= 2
    return [*sizes, most]


def _is_pure(hook: Any) -> bool:
    """Whether a replay may skip a hook's Python code: ours changes strides, those of PEFT ask for gradients."""
    return hook is as_matrix or getattr(hook, "__name__", "").startswith("make_inputs_require_grad")


def _obstacle(lm: Any, state: ModuleState) -> str | None:
    """The reason why a replay may differ from the model's forward; None if there is none."""
    why = not_traceable(lm)
    if why is not None:
        return why
    if any(tensor.device != lm.device for tensor in state.tensors):
        return "its weights are on several devices"
    if state.is_training:
        return "a part of it is in training mode"
    hook = next((hook for hook in state.hooks if not _is_pure(hook)), None)
    return None if hook is None else f"it has the hook {getattr(hook, '__qualname__', repr(hook))}"


class StepGraphs:
    """Computes steps of a language model with CUDA graphs, which it captures as they are needed.

    Args:
        lm: the language model.
        caches: as for ``Step``, for all slots.
        reproducible: whether all steps have the whole capacity as their span, so that their kernels are the same.

    Attributes:
        obstacle: why the model, as it is now, cannot be replayed; None if it can be tried.
    """

    def __init__(self, lm: Any, caches: Sequence[Tensor], reproducible: bool = False) -> None:
        self._lm, self._step, self._caches = lm, EagerStep(lm, caches), caches
        slots, capacity = caches[0].shape[0], caches[0].shape[2]
        self._rows = _sizes(1, slots)
        self._spans = [capacity] if reproducible else _sizes(SPAN_STEP, capacity)
        self._graphs = GraphCache(lm.device)
        self._inputs = {  # tokens and positions
            rows: torch.zeros((2, rows), dtype=torch.int64, device=lm.device) for rows in self._rows
        }
        self._pinned = lm.device.type == "cuda"  # so that the copy to the device does not wait
        self._logits: Tensor | None = None
        self._remember_model()

    def _remember_model(self) -> None:
        self._state, self._adapters = ModuleState(self._lm), FixedAdapters(self._lm)
        self.obstacle = _obstacle(self._lm, self._state)

    @property
    def failure(self) -> str | None:
        """Why a capture failed, after which the steps run eagerly; None if none has failed."""
        return self._graphs.failure

    def __len__(self) -> int:
        """The number of graphs."""
        return len(self._graphs)

    def clear(self) -> None:
        """Deletes all graphs."""
        self._graphs.clear()

    def serve(self) -> bool:
        """Whether graphs can compute what the model does now. If the model has changed, the old graphs are deleted."""
        if self.failure is not None or torch.is_autocast_enabled("cuda"):
            return False
        if not (self._state.is_current() and self._adapters.serve()):
            self.clear()
            self._remember_model()
        return self.obstacle is None

    def __call__(self, tokens: list[int], positions: list[int], options: dict[str, Any]) -> Tensor | None:
        return None if options or not self.serve() else self.run(tokens, positions)

    def run(self, tokens: list[int], positions: list[int]) -> Tensor:
        """The logits [B, V] after a token of each of the first B slots. The next call overwrites them.

        The host does not wait for the device, except during a capture.
        """
        rows = next(rows for rows in self._rows if rows >= len(tokens))
        span = next(span for span in self._spans if span > max(positions))
        padded = [values + [0] * (rows - len(values)) for values in (tokens, positions)]
        given = torch.tensor(padded, dtype=torch.int64, device="cpu", pin_memory=self._pinned)
        self._inputs[rows].copy_(given, non_blocking=True)
        self._graphs.run((rows, span), lambda: self._compute(rows, span))
        assert self._logits is not None
        return self._logits[: len(tokens)]

    def _compute(self, rows: int, span: int) -> None:
        tokens, positions = self._inputs[rows][..., None]
        caches = [cache[:rows] for cache in self._caches]
        logits = self._step.compute(tokens, positions, visible_tokens(span, positions), caches)
        if self._logits is None:  # in the first step, which is not captured
            self._logits = logits.new_empty((self._rows[-1], logits.shape[1]))
        self._logits[:rows] = logits
