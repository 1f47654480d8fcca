"""The step of a ``BatchDecoder`` on CUDA: captured in CUDA graphs, because launching its kernels one by one takes longer
than they run.

There is a graph per number of rows and span, both rounded up to few sizes. Rows that no sequence uses read token 0 at
position 0 of a free slot, which the slot's next prompt overwrites. A replay reads the weights where they are, so it
computes with new values of the same tensors. If anything else changes (``ModuleState``), all graphs are captured again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._internal.cuda_graphs import GraphCache, ModuleState
from ..integrations.peft.fixed import FixedAdapters
from .batch_step import SPAN_STEP, BatchStep
from .packages import CompilationError, causal_lm, not_traceable
from .prepare import as_matrix

_TOLERANCE = 1e-3  # of the self-test; eager and replayed steps run the same kernels


def _sizes(least: int, most: int) -> list[int]:
    """``least`` and its doubles below ``most``, then ``most``."""
    sizes = []
    while least < most:
        sizes.append(least)
        least *= 2
    return [*sizes, most]


def _is_pure(hook: Any) -> bool:
    """Whether a replay may leave out a hook: it changes strides, or asks for gradients (transformers and PEFT)."""
    return hook is as_matrix or getattr(hook, "__name__", "").startswith("make_inputs_require_grad")


def _variable(lm: Any, state: ModuleState) -> str | None:
    """The reason why a replay may differ from the model's forward; None if there is none."""
    if any(tensor.device != lm.device for tensor in state.tensors):
        return "its weights are on several devices"
    if state.is_training:
        return "a part of it is in training mode"
    hook = next((hook for hook in state.hooks if not _is_pure(hook)), None)
    return None if hook is None else f"it has the hook {getattr(hook, '__qualname__', repr(hook))}"


class StepGraphs:
    """Computes steps of a language model by CUDA graphs.

    Args:
        lm: the language model.
        caches: as for ``BatchStep``, for all slots, at least two.
        reproducible: whether all steps have the whole capacity as their span, so that their kernels are the same.

    Attributes:
        obstacle: why the model, as it is now, cannot be replayed; None if it can be tried.
    """

    def __init__(self, lm: Any, caches: Sequence[Tensor], reproducible: bool = False) -> None:
        self._lm, self._step, self._caches = lm, BatchStep(lm), caches
        slots, capacity = caches[0].shape[0], caches[0].shape[2]
        self._rows = _sizes(1, slots)
        self._spans = [capacity] if reproducible else _sizes(SPAN_STEP, capacity)
        self._graphs = GraphCache(lm.device)
        self._inputs = {  # tokens and positions
            rows: torch.zeros((2, rows), dtype=torch.int64, device=lm.device) for rows in self._rows
        }
        self._pinned = lm.device.type == "cuda"  # so that the copy to the device does not wait
        self._logits: Tensor | None = None
        self._look()

    def _look(self) -> None:
        self._state, self._adapters = ModuleState(self._lm), FixedAdapters(self._lm)
        self.obstacle = _variable(self._lm, self._state)

    @property
    def failure(self) -> str | None:
        """Why a capture failed, after which the steps run eagerly; None if none has failed."""
        return self._graphs.failure

    def __len__(self) -> int:
        """The number of graphs."""
        return len(self._graphs)

    def serve(self) -> bool:
        """Whether graphs compute what the model does now. If it has changed, they are deleted and captured again."""
        if self.failure is not None or torch.is_autocast_enabled("cuda"):
            return False
        if not (self._state.is_current() and self._adapters.serve(fully=True)):
            self._graphs.clear()
            self._look()
        return self.obstacle is None

    def __call__(self, tokens: list[int], positions: list[int]) -> Tensor:
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
        tokens, positions = self._inputs[rows]
        visible = torch.arange(span, dtype=torch.int64, device=positions.device) <= positions[:, None]
        logits = self._step(tokens, positions, visible, [cache[:rows] for cache in self._caches])
        if self._logits is None:  # in the first step, which is not captured
            self._logits = logits.new_empty((self._rows[-1], logits.shape[1]))
        self._logits[:rows] = logits

    def test(self) -> None:
        """Compares a replay with the step that warms it up.

        Raises:
            CompilationError: the step cannot be captured, or they differ.
        """
        vocabulary = self._lm.get_input_embeddings().num_embeddings
        tokens = [token % vocabulary for token in (5, 7)]
        first, replayed = (self(tokens, [0, 1]).double() for _ in range(2))
        for cache in self._caches:
            cache[:2].zero_()
        if self.failure is not None:
            raise CompilationError(f"its step cannot be captured: {self.failure}")
        if bool(first.isfinite().all()) and not (replayed - first).norm() <= _TOLERANCE * first.norm():
            raise CompilationError("a replay of its step differs from the step")


@torch.no_grad()
def load_graphs(model: Any, caches: Sequence[Tensor], reproducible: bool) -> StepGraphs:
    """The graphs of steps of ``model``, which are captured as they are needed. The arguments are those of ``StepGraphs``.

    Raises:
        CompilationError: they cannot compute steps of the model.
    """
    graphs = StepGraphs(causal_lm(model), caches, reproducible)
    why = not_traceable(model) or graphs.obstacle
    if why is not None:
        raise CompilationError(why)
    graphs.test()
    return graphs
