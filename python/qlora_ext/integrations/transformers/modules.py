"""Checks the 4-bit modules of a loaded transformers model, finds those that stay dense, and decodes a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...form import Form
from ...nn import (
    DENSE_RULES,
    DenseModules,
    Embedding4bit,
    Experts4bit,
    Packed4bit,
    TiedLinear4bit,
    conversion_of,
    is_dense,
    layers_of,
    paths_to,
    places_in,
)
from ...nn.dense_16bit import to_dense_classes
from ...untrusted import excerpt, printable
from .conv1d import Conv1D4bit


def _outside(module: nn.Module, inside: set[nn.Module], name: str = "") -> Iterator[str]:
    """The names of the outermost submodules of ``module``, called ``name``, that contain no module of ``inside``."""
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        if child in inside:
            continue
        if inside.isdisjoint(child.modules()):
            yield path
        else:
            yield from _outside(child, inside, path)


def _towers(model: Any) -> Iterator[str]:
    """The modules in the base model of a multimodal model that are outside its language model."""
    text_config, body = getattr(model.config, "text_config", None), model.base_model
    if text_config is None:
        return
    language = {m for m in body.modules() if type(getattr(m, "config", None)) is type(text_config)}
    if not language or body in language:
        return
    heads = {model.get_output_embeddings()} if body is model else set()
    names = {m: name for name, m in model.named_modules()}
    yield from (name for name in _outside(body, language, names[body]) if model.get_submodule(name) not in heads)


def dense_modules(model: nn.Module) -> DenseModules:
    """The heads and towers of the transformers models in ``model``, and the modules that they keep in float32."""
    from transformers import PreTrainedModel  # not at the top, because importing it may import this module

    dense_parts = DenseModules([], [], [])
    outermost: list[str] = []
    for name, m in model.named_modules():
        if not isinstance(m, PreTrainedModel) or not set(outermost).isdisjoint(["", *paths_to(name)]):
            continue
        outermost.append(name)
        prefix = f"{name}." if name else ""
        if m.base_model is not m:
            dense_parts.heads.extend(prefix + head for head in _outside(m, {m.base_model}))
        output = m.get_output_embeddings()
        dense_parts.heads.extend(prefix + path for path, module in m.named_modules() if module is output)
        dense_parts.towers.extend(prefix + tower for tower in _towers(m))
        float32 = {*(m._keep_in_fp32_modules or ()), *(m._keep_in_fp32_modules_strict or ())}
        dense_parts.always.extend(prefix + path for path, _ in m.named_modules() if path.rpartition(".")[2] in float32)
    return dense_parts


DENSE_RULES.append(dense_modules)


def tables_and_heads(model: nn.Module) -> set[str]:
    """The names of the embeddings of ``model`` and of its output heads."""
    embeddings = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    return embeddings | {*dense_modules(model).heads}


def packed_weights(module: nn.Module) -> tuple[str, ...]:
    """The names of the weights that would be 4-bit in the module for ``module``; empty if there is none for it."""
    return tuple(empty_layer(module, torch.float32, Form()).packed_shapes) if is_dense(module) else ()


def empty_layer(module: nn.Module, compute_dtype: torch.dtype, form: Form) -> Packed4bit:
    """The 4-bit module that replaces ``module``, on the meta device."""
    options: dict[str, Any] = {"compute_dtype": compute_dtype, "device": "meta", **form.keywords}
    if isinstance(module, nn.Embedding):
        table = Embedding4bit(module.num_embeddings, module.embedding_dim, module.padding_idx, **options)
        table.stand_for(module)
        return table
    cls = conversion_of(module)
    if cls is None:
        return Experts4bit(module, **options)
    n, k = module.weight.shape  # type: ignore[misc]
    if cls is Conv1D4bit:
        n, k = k, n
    layer = cls(k, n, bias=False, **options)
    if module.bias is not None:  # it keeps its dtype
        bias = torch.empty_like(module.bias, device="meta")  # type: ignore[arg-type]
        layer.bias = nn.Parameter(bias, requires_grad=False)
    if isinstance(module, nn.Linear):
        layer.stand_for(module)
    return layer


# The attributes under which PEFT's layers have the module that they adapt.
_ADAPTED = ("base_layer", "original_module")


class BaseNames:
    """The names that the tensors and modules of a model have without PEFT's adapters."""

    def __init__(self, model: nn.Module) -> None:
        self._adapted = {
            name: child
            for name, module in model.named_modules(remove_duplicate=False)
            for child in _ADAPTED
            if isinstance(getattr(module, child, None), nn.Module)
        }

    def __bool__(self) -> bool:
        """Whether the model has adapters."""
        return bool(self._adapted)

    def __getitem__(self, name: str) -> str | None:
        """The name without adapters; None for a tensor or module of an adapter."""
        path, base = "", list[str]()
        for part in name.split("."):
            adapted = self._adapted.get(path)
            if adapted is None:
                base.append(part)
            elif part != adapted:
                return None
            path = f"{path}.{part}" if path else part
        return ".".join(base)

    def select(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of ``state`` that belong to no adapter, by their names without adapters."""
        return {base: t for name, t in state.items() if (base := self[name]) is not None}


def check_complete(model: Any, found: Collection[str], stored: Sequence[str], files: Sequence[str]) -> None:
    """Rejects 4-bit checkpoints without the weight of a layer: transformers would draw it at random.

    Output heads may be new, and tied layers follow their tables.

    Args:
        found: the names of the weights of ``model`` that the checkpoint has, in 4 bits or dense.
        stored: the names of its 4-bit weights in the checkpoint.

    Raises:
        ValueError: there is such a layer.
    """
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    exempt = {*dense_modules(model).heads}
    for name, module in model.named_modules():
        weights = (f"{name}.{weight}".removeprefix(".") for weight in packed_weights(module))
        absent = [weight for weight in weights if weight not in found and weight not in tied]
        if absent and exempt.isdisjoint(paths_to(name)):
            where, others = printable(files[0]), [key for key in stored if key not in found]
            unknown = f"; the model has no place for {', '.join(map(excerpt, others[:3]))}" if others else ""
            raise ValueError(f"{where}: expected the weights {', '.join(absent)} too, found none{unknown}")


def check_loaded(model: nn.Module) -> None:
    """Rejects a checkpoint that lacks a tensor of a 4-bit layer, or has it in another form.

    Raises:
        ValueError: a tensor is missing, or has a wrong shape or dtype.
    """
    layers = {name: m for name, m in layers_of(model) if not hasattr(m, "_hf_hook")}  # the others are accelerate's
    absent = {}
    for name, layer in layers.items():
        tensors = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
        unfilled = [key for key, t in tensors.items() if not getattr(t, "_is_hf_initialized", False)]
        if unfilled:
            absent[name] = unfilled
    if absent:
        name, unfilled = next(iter(absent.items()))
        raise ValueError(
            f"{name}: the checkpoint has no {', '.join(unfilled)} for this 4-bit layer "
            f"({len(absent)} of {len(layers)} layers lack a tensor); "
            "name the layer in QLoRAConfig(skip_modules=[...]) to leave it dense"
        )
    for name, layer in layers.items():
        layer.check_form(prefix=f"{name}.")
        if isinstance(layer, TiedLinear4bit) and layer.weight is not layer.embedding.weight:
            if not torch.equal(layer.weight, layer.embedding.weight):
                raise ValueError(
                    f"{name}: expected the weight of the embedding that it is tied to, got another in the checkpoint; "
                    "load with QLoRAConfig(embeddings=False) or tie_word_embeddings=False"
                )
            layer.weight = layer.embedding.weight


def dense_names(model: nn.Module, embeddings: bool) -> list[str]:
    """The outermost modules of ``model`` that contain modules that could be 4-bit, and none that is.

    Args:
        embeddings: whether embeddings count as modules that could be 4-bit.
    """

    def counts(module: nn.Module) -> bool:
        return is_dense(module) and (embeddings or not isinstance(module, nn.Embedding))

    packed: set[nn.Module] = {m for _, m in layers_of(model)}
    return [name for name in _outside(model, packed) if any(map(counts, model.get_submodule(name).modules()))]


def refuse_split_experts(checkpoint_files: list[str]) -> None:
    """Rejects a checkpoint of transformers < 5 in which bitsandbytes quantized each expert separately.

    Raises:
        ValueError: the checkpoint has such experts, whose double-quantized scales cannot be stacked exactly.
    """
    from safetensors import safe_open

    for file in checkpoint_files:
        if not str(file).endswith(".safetensors"):
            continue
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  # no mapping
                if re.search(r"\.experts\.\d+\..*\.quant_state\.bitsandbytes__", key):
                    raise ValueError(
                        f"{file}: expected stacked experts, as transformers >= 5 saves them, got {key}; "
                        "load the original model with QLoRAConfig() instead"
                    )


def forms_of(model: nn.Module) -> dict[str, Form]:
    """The forms of the 4-bit layers of ``model``, by name, or by the names of their weights where these differ.

    Heads that are tied to a table have the table's form.
    """
    found: dict[str, Form] = {}
    for name, layer in layers_of(model):
        if not isinstance(layer, TiedLinear4bit):
            same = len({*layer.forms.values()}) == 1
            found |= {name: layer.form} if same else {f"{name}.{w}": form for w, form in layer.forms.items()}
    return found


def compute_dtype_of(model: nn.Module) -> torch.dtype | None:
    """The compute dtype of the first 4-bit layer of ``model``; None if it has no such layer."""
    return next((layer.compute_dtype for _, layer in layers_of(model)), None)


def dequantize_modules(model: Any, dtype: torch.dtype | str | None = None) -> Any:
    """Replaces every 4-bit module of ``model`` by its decoded dense module, in place."""
    # transformers reads the dtype from the configuration, where saving replaces it by its name.
    wanted: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if isinstance(model, Packed4bit):
        return model.to_dense(wanted)
    tables: dict[nn.Module, Any] = {}
    # Tied heads come last, because they are tied to the dense table.
    layers = sorted(layers_of(model), key=lambda item: isinstance(item[1], TiedLinear4bit))
    places = places_in(model)
    for name, layer in layers:
        hook = getattr(layer, "_hf_hook", None)
        if getattr(hook, "offload", False):
            raise ValueError(f"{name}: expected a layer in memory, got one offloaded by accelerate")
        if isinstance(layer, TiedLinear4bit):
            weight = tables[layer.embedding].weight
            dense: Any = layer.to_linear(weight=weight)
            dense.weight = weight
        else:
            dense = tables[layer] = layer.to_dense(wanted)
        if hook is not None:
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(dense, hook)
        for parent, child, _ in places[layer]:
            setattr(parent, child, dense)
    to_dense_classes(model)
    return model
