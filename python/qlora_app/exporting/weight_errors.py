"""How far the weights of an exported model are from those that were trained."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..models import validate_model
from ..models.pretrained import load_config
from ..models.sources import ModelSource
from .job import Factors

# What PEFT adds to the name of a layer, apart from the prefix of the whole model.
_ADDED = re.compile(r"\.(base_layer|token_adapter|modules_to_save\.default)(?=\.|$)")
_OF_PEFT = re.compile(r"\.(lora_\w+|original_module|trainable_tokens_\w+)(\.|$)")

# Computes a weight without and with the adapters, float32.
Pair = Callable[[], "tuple[Tensor, Tensor]"]


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


def name_in_model(name: str) -> str:
    """The name of a PEFT model's layer in the model without adapters."""
    return _ADDED.sub("", name.removeprefix("base_model.model."))


def weights_of(model: Any) -> dict[str, Pair]:
    """The matrices of a loaded model, which may have adapters, by their names in the dense model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    from qlora_ext.merging.layers import Over4bit
    from qlora_ext.nn import Packed4bit, TiedLinear4bit

    found: dict[str, Pair] = {}
    for name, module in model.named_modules():
        path = name_in_model(name)
        if _OF_PEFT.search(name) or isinstance(module, TiedLinear4bit):
            continue
        if isinstance(module, Over4bit):
            found.setdefault(f"{path}.{module.parameter_name}", module.before_and_after)
        elif isinstance(module, BaseTunerLayer):
            weight = getattr(module, "parameter_name", "weight")  # dense experts have several
            found.setdefault(f"{path}.{weight}", functools.partial(_merged, module, weight))
        elif isinstance(module, Packed4bit):
            for weight in module.packed_shapes:
                found.setdefault(f"{path}.{weight}", functools.partial(_decoded, module, weight))
        else:
            for weight, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 1:
                    found.setdefault(f"{path}.{weight}", functools.partial(_dense, parameter))
    return found


def _dense(parameter: Tensor) -> tuple[Tensor, Tensor]:
    weight = parameter.detach().float()
    return weight, weight


def _decoded(layer: Any, weight: str) -> tuple[Tensor, Tensor]:
    name = () if [*layer.packed_shapes] == ["weight"] else (weight,)
    decoded = layer.dequantize(*name, torch.float32)
    return decoded, decoded


def _merged(layer: Any, weight: str) -> tuple[Tensor, Tensor]:
    """A weight of a dense layer with adapters, into which they are merged."""
    before = getattr(layer.get_base_layer(), weight).detach().float().clone()
    layer.merge()
    return before, getattr(layer.get_base_layer(), weight).detach().float()


def weights_in(source: ModelSource, model: Any) -> dict[str, Callable[[], Tensor]]:
    """The matrices of an exported model, which has been loaded. Those of a GGUF file are read in its precision."""
    if source.gguf_file is not None:
        from qlora_ext.gguf import GGUFWeights

        file = pathlib.Path(source.path) / source.gguf_file
        weights = GGUFWeights(file, validate_model.skeleton(source, load_config(source)))
        return {name: functools.partial(weights.decode, name) for name in weights.values(set())}
    return {name: functools.partial(_first, pair) for name, pair in weights_of(model).items()}


def _first(pair: Pair) -> Tensor:
    return pair()[0]


@torch.no_grad()
def weight_errors(trained: Mapping[str, Pair], exported: Mapping[str, Callable[[], Tensor]]) -> Iterator[WeightError]:
    """The errors of all matrices that both models have."""
    from qlora_ext.merging.codes import retained_update

    for name in trained.keys() & exported.keys():
        before, after = (weight.cpu() for weight in trained[name]())
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
