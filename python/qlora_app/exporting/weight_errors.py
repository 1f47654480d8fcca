"""How far the weights of an exported model are from those that were trained."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qlora_ext.merging.codes import retained_update
from qlora_ext.merging.weights import ModelWeight, weights_of
from qlora_ext.nn import TiedLinear4bit

from ..models import validate_model
from ..models.pretrained import load_config
from ..models.sources import ModelSource
from .job import Factors


@dataclasses.dataclass(frozen=True)
class WeightError:
    """The difference between an exported weight and the trained one, or between their updates by an adapter.

    Attributes:
        name: of the layer in the model.
        error, size: the norms of the difference, and of the trained weight.
        retained, update: as in ``retained_update``; 0 without an adapter.
        noise: the standard deviation of ``retained`` by the rounding of the weight.
    """

    name: str
    error: float
    size: float
    retained: float = 0.0
    update: float = 0.0
    noise: float = 0.0

    @property
    def relative(self) -> float:
        """‖Ŵ - W‖ / ‖W‖."""
        return self.error / self.size if self.size else (math.inf if self.error else 0.0)


def matrices_of(model: Any) -> dict[str, ModelWeight]:
    """The matrices of a loaded model, which may have adapters, by their names in the dense model."""
    found = weights_of(model).items()
    return {name: w for name, w in found if w.is_matrix and not isinstance(w.module, TiedLinear4bit)}


def exported_matrices(source: ModelSource, model: Any) -> dict[str, Callable[[], Tensor]]:
    """The matrices of an exported model, which has been loaded. Those of a GGUF file are read in its precision."""
    if source.gguf_file is not None:
        from qlora_ext.gguf import GGUFWeights

        file = pathlib.Path(source.path) / source.gguf_file
        weights = GGUFWeights(file, validate_model.skeleton(source, load_config(source)))
        return {name: functools.partial(weights.decode, name) for name in weights.values(set())}
    return {name: functools.partial(_value, weight) for name, weight in matrices_of(model).items()}


def _value(weight: ModelWeight) -> Tensor:
    return weight.before_and_after()[0]


@torch.no_grad()
def weight_errors(
    trained: Mapping[str, ModelWeight], exported: Mapping[str, Callable[[], Tensor]]
) -> Iterator[WeightError]:
    """The errors of all matrices that both models have."""
    for name in trained.keys() & exported.keys():
        before, after = (weight.cpu() for weight in trained[name].before_and_after())
        weight = exported[name]().cpu()
        update = after - before
        retained, total = retained_update(update, before, weight) if update.any() else (0.0, 0.0)
        error = (weight - after).norm().item()
        noise = error * math.sqrt(total / update.numel())
        yield WeightError(name.removesuffix(".weight"), error, after.norm().item(), retained, total, noise)


def update_errors(factors: Mapping[str, tuple[Factors, Factors]]) -> Iterator[WeightError]:
    """The errors of the updates of an adapter."""
    for layer, ((a, b, scaling), (other_a, other_b, other_scaling)) in factors.items():
        update, other = scaling * (b @ a), other_scaling * (other_b @ other_a)
        retained = (other * update).sum().item()
        yield WeightError(
            layer, (other - update).norm().item(), update.norm().item(), retained, update.norm().item() ** 2
        )
