"""What 4 bits cost each layer of a model: the error of its outputs, and what that error does to the model's loss.

The error of a layer's outputs alone says little: of two errors of one size, one may hit what the layers after it look
at. What counts is the loss. Let e be the change that quantizing one layer makes to its outputs, and p the model's
predictions. The Kullback-Leibler divergence of the changed predictions from p is, to second order, ½ eᵀ F e, F being
the Fisher information of the outputs: the mean of g gᵀ over labels drawn from p, where g is the gradient of the
labels' log-likelihood. So it is half the mean square of the derivative g · e, of the loss in the direction of
quantizing that layer. One forward and one backward pass give this derivative for all layers at once: each layer's
output becomes y + s · e with a number s = 0 of its own, and the derivative is the gradient of s.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.stages import without_cache
from ..nn import Packed4bit, TiedLinear4bit
from .loss import logits_of

# Labels drawn for each sequence: a backward pass each, and one more sample of the derivative's square.
_DRAWS = 2


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """What 4 bits cost one layer.

    Attributes:
        name: of the layer in the model.
        error: of its outputs on the inputs that reach it in the dense model, relative: ‖Ŷ - Y‖ / ‖Y‖ without bias.
        plain_error: the same of plain NF4 in the same block sizes.
        loss: how much the loss rises by this layer alone, all others dense: a second-order estimate in nats per token.
        extra_bytes: what the layer would take more if it were dense; 0 for a head that is tied to an embedding.
        weight_ratio: how many times as far the weights are from the dense ones as plain NF4's are: 1 for plain NF4.
    """

    name: str
    error: float
    plain_error: float
    loss: float
    extra_bytes: int
    weight_ratio: float = 1.0


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A 4-bit module in the place of a dense one.

    Attributes:
        name: of both.
        packed: the module.
        plain: the same in plain NF4; None where ``packed`` is just that.
        weight_ratio: see ``LayerCost``.
    """

    name: str
    packed: Packed4bit
    plain: Packed4bit | None = None
    weight_ratio: float = 1.0


def extra_bytes(packed: Packed4bit) -> int:
    """What ``packed`` would take more if its weights were dense, in its compute dtype."""
    if isinstance(packed, TiedLinear4bit):
        return 0  # the table's
    dense = sum(math.prod(shape) for shape in packed.packed_shapes.values()) * packed.compute_dtype.itemsize
    return dense - sum(packed.packed_weight(name).nbytes for name in packed.packed_shapes)


class _Watched:
    """A hook on a dense module: the errors of what stands in for it, and the number s of the derivative."""

    def __init__(self, dense: nn.Module, candidate: Candidate, device: torch.device) -> None:
        self.candidate = candidate
        self.scale = torch.zeros((), dtype=torch.float32, device=device, requires_grad=True)
        self.squares = 0.0  # of the derivative, summed up over labels and sequences
        self._sums = {"whole": 0.0, "packed": 0.0, "plain": 0.0}
        self.handle = dense.register_forward_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        with torch.no_grad():
            bias = getattr(module, "bias", None)
            self._add("whole", y if bias is None else y - bias)
            change = self.candidate.packed(*args, **kwargs) - y
            self._add("packed", change)
            if self.candidate.plain is not None:
                self._add("plain", self.candidate.plain(*args, **kwargs) - y)
        moved: Tensor = y + self.scale * change
        return moved

    def _add(self, name: str, t: Tensor) -> None:
        self._sums[name] += t.float().square().sum().item()

    def _relative(self, name: str) -> float:
        whole = self._sums["whole"]
        return math.sqrt(self._sums[name] / whole) if whole > 0 else 0.0

    def cost(self, samples: int, tokens: int) -> LayerCost:
        """What was found in ``samples`` of the derivative, over sequences of ``tokens`` each."""
        error = self._relative("packed")
        return LayerCost(
            self.candidate.name,
            error,
            error if self.candidate.plain is None else self._relative("plain"),
            self.squares / (2 * samples * tokens),
            extra_bytes(self.candidate.packed),
            self.candidate.weight_ratio,
        )


def measure(
    model: nn.Module,
    candidates: Mapping[nn.Module, Candidate],
    ids: Tensor,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[LayerCost]:
    """What the 4-bit ``candidates`` cost the dense modules of ``model`` whose places they would take, on a text.

    One sequence at a time runs through the model, forward and backward; besides the model and the candidates it takes
    the activations of that.

    Args:
        model: dense, a language model; nothing in it is changed.
        candidates: by the module of ``model``, on its device.
        ids: token ids int64 [B, T].
        seed: of the labels that are drawn.
        progress: called with the sequences done, and their number.
    """
    generator = torch.Generator(ids.device).manual_seed(seed)
    watched = [_Watched(dense, candidate, ids.device) for dense, candidate in candidates.items()]
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)  # of activations alone
    try:
        with without_cache(model), torch.enable_grad():
            for i, row in enumerate(ids.split(1)):
                _add_squares(model, watched, row, generator)
                if progress is not None:
                    progress(i + 1, len(ids))
    finally:
        for w in watched:
            w.handle.remove()
        for p in trained:
            p.requires_grad_(True)
    return [w.cost(len(ids) * _DRAWS, ids.shape[1]) for w in watched]


def _add_squares(model: nn.Module, watched: list[_Watched], row: Tensor, generator: torch.Generator) -> None:
    likelihood = logits_of(model, row)[0].log_softmax(-1)
    p = likelihood.detach().exp()
    scales = [w.scale for w in watched]
    for _ in range(_DRAWS):
        labels = torch.multinomial(p, 1, generator=generator)
        drawn = likelihood.gather(1, labels).sum()
        found = torch.autograd.grad(drawn, scales, retain_graph=True, allow_unused=True)  # experts may see no token
        for w, derivative in zip(watched, found, strict=True):
            w.squares += 0.0 if derivative is None else derivative.item() ** 2
