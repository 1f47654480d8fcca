"""Estimates what 4 bits cost each layer of a model: the error of its outputs, and the resulting increase of the loss.

The error of a layer's outputs is not enough, because the following layers are more sensitive to some errors than to
others of the same size. Let e be the change of a layer's outputs by quantizing it, and p the model's predictions. To
second order, the Kullback-Leibler divergence of the changed predictions from p is ½ eᵀ F e. F is the Fisher information
of the outputs: the mean of g gᵀ over labels drawn from p, where g is the gradient of the labels' log-likelihood. The
divergence is thus half the mean square of g · e, the directional derivative of the log-likelihood.

One forward and one backward pass give this derivative for all layers at once: each layer's output becomes y + s · e
with its own scalar s = 0, and the derivative is the gradient of s.
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
from .comparison import logits_of

# Label sequences drawn per text sequence. Each takes one backward pass and gives one sample of the squared derivative.
_DRAWS = 2


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """What 4 bits cost one layer.

    Attributes:
        name: of the layer in the model.
        error: relative error of the outputs on the inputs of the dense model: ‖Ŷ - Y‖ / ‖Y‖, without the bias.
        plain_error: the same for plain NF4 with the same block sizes.
        loss: a second-order estimate of the increase of the loss if only this layer is 4-bit, in nats per token.
        extra_bytes: additional size of the layer if it were dense; 0 for a head that is tied to an embedding.
        weight_ratio: the weight error divided by that of plain NF4; 1 for plain NF4.
    """

    name: str
    error: float
    plain_error: float
    loss: float
    extra_bytes: int
    weight_ratio: float = 1.0


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A 4-bit module that may replace a dense one.

    Attributes:
        name: of both modules.
        packed: the 4-bit module.
        plain: the module in plain NF4; None if ``packed`` is plain NF4.
        weight_ratio: see ``LayerCost``.
    """

    name: str
    packed: Packed4bit
    plain: Packed4bit | None = None
    weight_ratio: float = 1.0


def extra_bytes(packed: Packed4bit) -> int:
    """The additional bytes of ``packed`` if its weights were dense in its compute dtype."""
    if isinstance(packed, TiedLinear4bit):
        return 0  # the weight is the table's
    dense = sum(math.prod(shape) for shape in packed.packed_shapes.values()) * packed.compute_dtype.itemsize
    return dense - sum(packed.packed_weight(name).nbytes for name in packed.packed_shapes)


class _Watched:
    """A hook on a dense module. It measures the errors of a candidate, and adds the scalar s of the derivative."""

    def __init__(self, dense: nn.Module, candidate: Candidate, device: torch.device) -> None:
        self.candidate = candidate
        self.scale = torch.zeros((), dtype=torch.float32, device=device, requires_grad=True)
        self.squares = 0.0  # sum of the squared derivative over labels and sequences
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
        total = self._sums["whole"]
        return math.sqrt(self._sums[name] / total) if total > 0 else 0.0

    def cost(self, samples: int, tokens: int) -> LayerCost:
        """The result from ``samples`` samples of the derivative, on sequences of ``tokens`` tokens each."""
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
    """Measures on a text what each of the 4-bit ``candidates`` would cost.

    One sequence at a time runs forward and backward through the model, so memory holds the model, the candidates and
    the activations of one sequence.

    Args:
        model: a dense language model. It is not changed.
        candidates: for each module of ``model`` the 4-bit module, on its device.
        ids: token ids int64 [B, T].
        seed: of the random labels.
        progress: called with the number of finished sequences and the number of all sequences.
    """
    generator = torch.Generator(ids.device).manual_seed(seed)
    watched = [_Watched(dense, candidate, ids.device) for dense, candidate in candidates.items()]
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)  # only activations need gradients
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
    likelihood = logits_of(model, row)[0].float().log_softmax(-1)
    p = likelihood.detach().exp()
    scales = [w.scale for w in watched]
    for _ in range(_DRAWS):
        labels = torch.multinomial(p, 1, generator=generator)
        drawn = likelihood.gather(1, labels).sum()
        found = torch.autograd.grad(drawn, scales, retain_graph=True, allow_unused=True)  # experts may see no token
        for w, derivative in zip(watched, found, strict=True):
            w.squares += 0.0 if derivative is None else derivative.item() ** 2
