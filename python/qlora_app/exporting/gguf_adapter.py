"""The target ``gguf-adapter``: LoRA on linear layers and experts, for llama.cpp and Ollama."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import gguf
import torch
from torch import Tensor

from ..errors import UserError, first_line, reading
from ..models import validate_model
from ..models.adapter_files import base_of, check_files, find
from ..models.pretrained import load_config
from .job import Factors, Job
from .lora import PREFIX, adapted_layers, architecture_of, check_biases, check_plain, check_tied
from .targets import ExportRequest

if TYPE_CHECKING:
    from qlora_ext.integrations.peft.experts import LoraExperts4bit

    from ..gguf.adapter import Place

_TARGET = "--to gguf-adapter"
_HEADER = 1 << 16  # bytes


def prepare(request: ExportRequest) -> Job:
    """The adapter, as float32 or float16."""
    from qlora_ext.dtype_names import dtype_named
    from qlora_ext.integrations.peft.experts import LoraExperts4bit
    from qlora_ext.nn import quantize_model

    from ..gguf.adapter import fold, places

    if request.adapter is None:
        raise UserError(f"{_TARGET}: expected an adapter (--adapter), got a model; use --to dense")
    adapter = find(request.adapter)
    check_files(adapter)
    source = base_of(adapter, request.model, request.trust_remote_code)
    base_config = load_config(source)
    model = validate_model.skeleton(source, base_config)
    check_biases(_TARGET, adapter, model)
    check_plain(_TARGET, adapter)
    architecture = architecture_of(_TARGET, source, base_config)
    check_tied(_TARGET, adapter, model)
    with torch.device("meta"):
        quantized = quantize_model(validate_model.skeleton(source, base_config))
    adapted = adapted_layers(_TARGET, adapter, quantized)
    stacks = {name: (path, layer) for name, (path, layer) in adapted.items() if isinstance(layer, LoraExperts4bit)}
    names = {name: name.removesuffix(".weight") for name in (*sorted(adapted.keys() - stacks), *stacks)}
    loras = {layer: adapted[name][1] for name, layer in names.items()}
    scalings = {layer: (float(lora.scaling["default"]), lora.r["default"]) for layer, lora in loras.items()}
    try:
        alpha, factors = fold(scalings)
        in_file = places(architecture, model, names)
    except ValueError as error:
        raise UserError(f"{_TARGET}: {first_line(error)}; use --to dense") from error
    kept = dtype_named("float16" if request.kind == "f16" else "float32")
    count = 0
    for name, (_, lora) in adapted.items():
        a, b = (matrices["default"].weight.numel() for matrices in (lora.lora_A, lora.lora_B))
        count += a * len(in_file[name]) + b
    layers = {layer: (in_file[name], factors[layer]) for name, layer in names.items()}
    plan = _Plan(adapter, architecture, alpha, layers, stacks, kept)
    return Job(
        count * kept.itemsize + _HEADER, functools.partial(_build, plan), functools.partial(_read, plan, scalings)
    )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A checked export.

    Attributes:
        layers: for each layer or stack the tensors in the base's file, and the factor of B.
        stacks: of the layers those on experts, and their names in the adapter's file.
    """

    adapter: pathlib.Path
    architecture: str
    alpha: float
    layers: dict[str, tuple[list[Place], float]]
    stacks: dict[str, tuple[str, LoraExperts4bit]]
    dtype: torch.dtype


def _build(plan: _Plan, _: object) -> Callable[[pathlib.Path], None]:
    from ..gguf.adapter import write_adapter

    matrices = dict(_matrices(plan))
    return lambda path: write_adapter(path, plan.architecture, plan.alpha, matrices)


def _read(
    plan: _Plan, scalings: Mapping[str, tuple[float, int]], path: pathlib.Path
) -> dict[str, tuple[Factors, Factors]]:
    """The factors of each layer, or stack of them, that were trained and in the file ``path``, float32.

    Raises:
        UserError: the file is damaged, or its tensors of one stack have different A.
    """
    trained, found = [*_factors(plan)], {}
    with reading("weights", str(path)):
        reader = gguf.GGUFReader(path)
        alpha = reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents()
        matrices = {tensor.name: torch.from_numpy(tensor.data.copy()).float() for tensor in reader.tensors}
        for name, a, b in trained:
            places, in_b = plan.layers[name][0], torch.empty_like(b)
            for place in places:
                in_b[..., place.rows, :] = matrices[f"{place.tensor}.lora_b"]
            in_a, *others = (matrices[f"{place.tensor}.lora_a"] for place in places)
            if not all(torch.equal(in_a, other) for other in others):
                raise UserError(f"{path}: the tensors of {name} have different A")
            found[name] = (a, b, scalings[name][0]), (in_a, in_b, alpha / in_a.shape[-2])
    return found


def _factors(plan: _Plan) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The layers, or stacks of them, and their A and B, float32."""
    from safetensors.torch import load_file

    with reading("weights", str(plan.adapter)):
        weights = load_file(plan.adapter / "adapter_model.safetensors")
    for name in plan.layers:
        if name in plan.stacks:
            yield name, *_of_experts(*plan.stacks[name], weights)
        else:
            a, b = (weights[f"{PREFIX}{name}.lora_{side}.weight"].float() for side in "AB")
            yield name, a, b


def _matrices(plan: _Plan) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """A and B of each tensor of the base's file."""
    for name, a, b in _factors(plan):
        places, factor = plan.layers[name]
        a, b = a.to(plan.dtype), (b * factor).to(plan.dtype)
        if not (a.isfinite().all() and b.isfinite().all()):
            raise UserError(
                f"{_TARGET}: the adapter of {name} has NaN, infinity or a value that {plan.dtype} cannot hold; try "
                "--to gguf-adapter, which writes float32"
            )
        for place in places:
            yield place.tensor, (a, b[..., place.rows, :])


def _of_experts(path: str, layer: LoraExperts4bit, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A [E, R, K] and B [E, N, R] of the layer that has the name ``path`` in the adapter's file."""
    for side, modules in (("A", layer.lora_A), ("B", layer.lora_B)):
        weight = weights[f"{PREFIX}{path}.lora_{side}.weight"].float()
        modules["default"].weight = torch.nn.Parameter(weight, requires_grad=False)
    a, b, _ = layer.factors("default")
    return a, b
