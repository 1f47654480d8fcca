"""``QLoRAQuantizer``: puts 4-bit modules into a model that transformers loads, fills and checks them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from ..._library import cuda_is_usable
from ...bitsandbytes_format import COMPANIONS
from ...form import Form
from ...nn import (
    AFTER_QUANTIZE,
    CONVERSIONS,
    Embedding4bit,
    Packed4bit,
    TiedLinear4bit,
    activations_of,
    check_something_is_4bit,
    conversion_of,
    dense_modules,
    is_fused_experts,
    layers_of,
    paths_to,
    places_in,
    report_coverage,
    tied_heads,
)
from ...nn.compute_dtype import multiply_in_float32
from ...streaming import stream
from ...weight import Weight4bit
from . import safe_conversions
from .checkpoint.headers import check_dense
from .config import METHOD, QLoRAConfig
from .conv1d import Conv1D4bit
from .mapped_files import MappedFiles
from .model_card import OursMetadata
from .modules import (
    BaseNames,
    check_loaded,
    compute_dtype_of,
    dense_names,
    dequantize_modules,
    empty_layer,
    forms_of,
    packed_weights,
    refuse_split_experts,
)
from .stored_config import forget_mlx
from .weight_source import Source


def _tied_names(model: nn.Module) -> dict[str, str]:
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return tied


def _tied_modules(model: nn.Module) -> list[str]:
    tied = _tied_names(model)
    return sorted({name.removesuffix(".weight") for name in (*tied.keys(), *tied.values())})


class QLoRAQuantizer(HfQuantizer):
    """Replaces layers of a model by 4-bit ones before transformers loads its weights, and then fills them."""

    requires_calibration = False
    quantization_config: QLoRAConfig

    def __init__(self, quantization_config: QLoRAConfig, **kwargs: Any) -> None:
        super().__init__(copy.copy(quantization_config), **kwargs)  # each model records its own layers
        self.mapped_files = MappedFiles([])  # the checkpoint that is being loaded
        self.not_finite: dict[str, str] = {}  # weights with NaN or infinity, and the index of the first
        self.conversions: list[Any] | None = None  # the original ones, to be restored for a dense model
        self.qlora_config = self.quantization_config
        # The storage dtype of the packed bytes in a checkpoint of bitsandbytes, else None.
        self.bitsandbytes_storage = self.qlora_config._bitsandbytes_storage if self.pre_quantized else None
        self.qlora_config._bitsandbytes_storage = None  # the model will be saved in our format
        self.source: Source | None = self.qlora_config._source
        self.forms: dict[str, Form] = {}  # of the weights that the source has in 4 bits, by their names in the model
        self.streaming_device: Any = None  # the device on which a streamed model computes; it is loaded on the CPU

    @property
    def reads_our_format(self) -> bool:
        """Whether the checkpoint was saved by this package, so that its tensors are those of the modules."""
        return bool(self.pre_quantized) and self.bitsandbytes_storage is None and self.source is None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        on_disk = isinstance(device_map, dict) and "disk" in device_map.values()
        if on_disk and not self.reads_our_format:
            raise ValueError(
                "device_map: expected no layers on disk, where transformers reads them from the dense checkpoint; "
                "load and save the model in 4 bits first"
            )
        if self.qlora_config.stream is None:
            return
        if self.qlora_config.stream == "disk" and not self.reads_our_format:
            advice = "load and save the model in 4 bits first, or use stream='ram'"
            if self._saves_source:
                assert self.source is not None
                advice = (
                    f"load the {self.source.name} checkpoint, call save_in_our_format and save it, or use stream='ram'"
                )
            raise ValueError(f"stream: 'disk' needs a 4-bit model saved by qlora_ext; {advice}")

    def update_device_map(self, device_map: Any) -> Any:
        if self.qlora_config.stream is not None:
            devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
            if len(devices) > 1 or devices & {"balanced", "balanced_low_0", "sequential", "disk"}:
                raise ValueError(f"device_map: expected one device for a streamed model, got {device_map}")
            self.streaming_device = devices.pop()
            if self.streaming_device in (None, "auto"):  # a streamed model fits one device
                self.streaming_device = torch.cuda.current_device() if cuda_is_usable() else "cpu"
            return {"": "cpu"}
        # A quantized model goes to the GPU if there is one, as for bitsandbytes.
        if device_map is None and cuda_is_usable():
            return {"": torch.cuda.current_device()}
        return device_map

    def read_header(self, gguf_file: str) -> None:
        """Called by transformers with the path of a GGUF file, which the source opens when the model exists."""

    def get_state_dict(self, gguf_file: str, model: nn.Module) -> dict[str, Any]:
        """The values of a GGUF file's weights, for transformers."""
        assert self.source is not None
        return self.source.values()

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        return torch.get_default_dtype() if dtype is None else dtype  # None: "auto" for a GGUF file

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, Packed4bit) and name in module.packed_shapes

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, Packed4bit) and name in module.packed_shapes:
            # Of the packed weight, whether the parameter still has the dense shape or is packed.
            return math.prod(module.packed_shapes[name]) * module.forms[name].bits / 8 / param.numel()
        size: float = super().param_element_size(model, param_name, param)
        return size

    @property
    def follows_bitsandbytes(self) -> bool:
        """Whether to quantize exactly the layers that bitsandbytes would quantize."""
        return self.bitsandbytes_storage is not None

    def _to_convert(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The modules to replace by 4-bit ones, and their names. Tied heads follow their tables and are not listed."""
        config = self.qlora_config
        if self.follows_bitsandbytes:
            fp32: list[str] = [*(getattr(model, "_keep_in_fp32_modules", None) or [])]
            skipped = {*self.get_modules_to_not_convert(model, config.skip_modules, fp32), *_tied_modules(model)}
            yield from self._linear_layers(model, sorted(skipped))
            return
        if self.source is not None and not self.source.quantizes_rest:
            yield from ((name, module) for name, module in list(model.named_modules()) if self._forms(name, module))
            return
        named = {*(config.skip_modules or ())}
        dense_parts = dense_modules(model)
        if self.pre_quantized:  # the configuration lists the full names of all dense modules
            dense = named & {name for name, _ in model.named_modules()}
        else:
            dense = {*dense_parts.always, *(dense_parts.heads if config.skip_modules is None else ())}
            dense |= {*(() if config.towers else dense_parts.towers)}
        patterns = sorted(named - dense if self.pre_quantized else named)
        tables = tied_heads(model, _tied_names(model), dense_parts.always) if config.embeddings else {}
        tied = {*_tied_modules(model)}
        for name, module in list(model.named_modules()):
            if self._forms(name, module):
                yield name, module
                continue
            if module in tables:
                full_names = dense
            elif conversion_of(module) is not None or is_fused_experts(module):
                full_names = dense | tied
            else:
                continue
            paths = paths_to(name)
            if full_names.isdisjoint(paths) and all(should_convert_module(path, patterns) for path in paths):
                yield name, module

    def _forms(self, name: str, module: nn.Module) -> dict[str, Form]:
        """The forms in which the source has the weights of a module; empty if it does not have all of them."""
        weights = packed_weights(module) if self.forms else ()
        forms = {weight: self.forms.get(f"{name}.{weight}".removeprefix(".")) for weight in weights}
        return {weight: form for weight, form in forms.items() if form is not None} if all(forms.values()) else {}

    def _empty_layer(self, name: str, module: nn.Module, compute_dtype: torch.dtype) -> Packed4bit:
        config = self.qlora_config
        layer = empty_layer(module, compute_dtype, config.form_of(name))
        form = layer.form if isinstance(module, nn.Embedding) else config.form_of(name, layer.packed_shapes.values())
        own = {weight: config.forms.get(f"{name}.{weight}", form) for weight in layer.packed_shapes}
        layer.take_forms(self._forms(name, module) or own)
        return layer

    def _asked(self, model: nn.Module) -> list[str]:
        """The modules of ``model`` that the configuration requests to be dense."""
        named = self.qlora_config.skip_modules
        return [name for name, _ in model.named_modules() if named and not should_convert_module(name, named)]

    def _check_skipped(self, model: nn.Module) -> None:
        """Rejects names of ``skip_modules`` whose weights are 4-bit in the checkpoint.

        Raises:
            ValueError: there is such a name.
        """
        assert self.source is not None
        asked, packed = {*self._asked(model)}, {name.rpartition(".")[0]: None for name in self.forms}
        refused = [name for name in packed if not asked.isdisjoint(paths_to(name))]
        if refused:
            raise ValueError(
                f"skip_modules: expected layers that are dense in this {self.source.name} checkpoint, got "
                f"{', '.join(refused[:3])} ({len(refused)} in all); load them, and replace them by their to_dense()"
            )

    def _linear_layers(self, model: nn.Module, skipped: list[str]) -> Iterator[tuple[str, nn.Module]]:
        """The layers that bitsandbytes would quantize, selected by transformers' own rule."""
        for name, module in list(model.named_modules()):
            if type(module) in CONVERSIONS and should_convert_module(name, skipped):
                yield name, module

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        checkpoint_files = [str(file) for file in kwargs.get("checkpoint_files") or []]
        self.mapped_files = MappedFiles(checkpoint_files)
        if self.bitsandbytes_storage is not None and any(is_fused_experts(m) for m in model.modules()):
            refuse_split_experts(checkpoint_files)
        model_dtype: torch.dtype = model.config.dtype
        if self.source is not None:
            self.forms = self.source.forms(model, checkpoint_files)
            self.source.release = self.mapped_files.release
            if not self.source.quantizes_rest:
                self._check_skipped(model)
        elif not self.pre_quantized and checkpoint_files and all(f.endswith(".safetensors") for f in checkpoint_files):
            check_dense(checkpoint_files)
        # transformers < 5.20 casts the tensors that it reads to the dtype of these placeholders.
        as_read = self.bitsandbytes_storage or (None if self.reads_our_format else model_dtype)
        places, heads = places_in(model), tied_heads(model, _tied_names(model))
        chosen = list(self._to_convert(model))
        if not self.follows_bitsandbytes:  # for bitsandbytes, transformers itself warns
            check_something_is_4bit(model, bool(chosen), self._asked(model))
        compute_dtype = self.qlora_config.computing_dtype(model_dtype, self.streaming_device)
        for name, module in chosen:
            layer = self._empty_layer(name, module, compute_dtype)
            layer.expose()  # transformers loads tensors by the names in files
            layer.weight_dtype = model_dtype
            # Conversions read the shape of the weight that they create. A tied head shares the table's weight.
            shaped = module if self.bitsandbytes_storage is None and not isinstance(module, nn.Embedding) else layer
            for weight in layer.packed_shapes:
                if as_read is not None:
                    dense = torch.empty_like(getattr(shaped, weight), dtype=as_read, device="meta")
                    setattr(layer, weight, nn.Parameter(dense, requires_grad=False))
            new: dict[nn.Module, Packed4bit] = {module: layer}
            if isinstance(module, nn.Embedding):
                assert isinstance(layer, Embedding4bit)
                new |= {head: TiedLinear4bit(layer, head.bias) for head in heads[module]}
            for old, replacement in new.items():
                replacement._is_hf_initialized = True  # type: ignore[assignment]  # no random initialization
                replacement.activations = self.qlora_config.activations
                for parent, name, _ in places[old]:
                    setattr(parent, name, replacement)

    def get_quantize_ops(self) -> Any:
        from .weight_operations import Quantize

        return Quantize(self.quantize, self.mapped_files.release, self.not_finite, self.qlora_config._spill)

    def get_weight_conversions(self) -> list[Any]:
        if self.bitsandbytes_storage is None:
            return []
        from transformers.core_model_loading import WeightConverter

        from .weight_operations import LoadBitsandbytes

        sources = [*(f"weight.{name}" for name in COMPANIONS), "weight"]
        return [WeightConverter(sources, "weight", operations=[LoadBitsandbytes(self)])]

    def quantize(self, module: Packed4bit, weight: torch.Tensor) -> Weight4bit:
        """Quantizes a dense ``weight`` of a checkpoint for ``module``."""
        return module.quantize(weight.T if isinstance(module, Conv1D4bit) else weight)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.source is not None and self.source.error is not None:
            raise self.source.error
        if self.not_finite:
            name, where = next(iter(self.not_finite.items()))
            more = f" ({len(self.not_finite)} weights have NaN or infinity)" if len(self.not_finite) > 1 else ""
            raise ValueError(f"{name}: {where.removeprefix('w: ')}{more}")
        check_loaded(model)
        if self.source is not None:
            self.source.loaded(model)
            self.qlora_config.embeddings = any(isinstance(m, Embedding4bit) for m in model.modules())
            if not self._saves_source:
                self.source = self.qlora_config._source = None
        for _, layer in layers_of(model):
            layer.join()
        if self.bitsandbytes_storage is not None:
            forget_bitsandbytes_keys(model)
            self.qlora_config.embeddings = False
        if not self.pre_quantized:
            report_coverage(model, self._asked(model), stacklevel=2)
        self.qlora_config.skip_modules = dense_names(model, self.qlora_config.embeddings)
        if self.qlora_config.dense_computing_dtype(model.config.dtype, self.streaming_device) == torch.float32:
            multiply_in_float32(model)
        self.save_packed_state(model)
        if not self._saves_source:
            self.qlora_config.record(forms_of(model))
        if self.qlora_config.stream is not None:
            stream(model, self.qlora_config.resident, self.qlora_config.stream, self.streaming_device)
            model.hf_device_map = {"": self.streaming_device}
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        if self.reads_our_format:
            weight_conversions = safe_conversions.for_loading(model, weight_conversions)
        if self.source is not None:
            weight_conversions = self.source.conversions(weight_conversions)
        updated: list[Any] = super().update_weight_conversions(weight_conversions, model)
        return updated

    def save_packed_state(self, model: Any) -> None:
        """Makes ``save_pretrained`` write packed weights unchanged, under their names in the model."""
        found = getattr(model, "_weight_conversions", None)
        if self._saves_source:
            assert self.source is not None
            model._weight_conversions = self.conversions = self.source.prepare_saving(found or [])
        else:
            self.conversions = found
            model._weight_conversions = safe_conversions.for_saving(model, found)

    @property
    def _saves_source(self) -> bool:
        """Whether the model is saved in the format of its checkpoint, and not in ours."""
        return self.source is not None and self.source.saved_config is not None

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        if getattr(model, "_hf_peft_config_loaded", False):  # transformers saves the adapter alone
            return None, {}
        if self._saves_source:
            assert self.source is not None
            return self.source.state_dict(model), {}
        names = BaseNames(model)
        return (names.select(model.state_dict()) if names else None), OursMetadata(self.qlora_config.activations)

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        model = dequantize_modules(model, dtype)
        forget_mlx(model.config)
        model._weight_conversions = self.conversions
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def forget_bitsandbytes_keys(model: Any) -> None:
    """Removes the conversions with which bitsandbytes' keys were read, so that saving does not reverse them."""

    def reads_them(conversion: Any) -> bool:
        return "weight.quant_map" in getattr(conversion, "source_patterns", ())

    found = getattr(model, "_weight_conversions", None)
    if found is not None:
        model._weight_conversions = [c for c in found if not reads_them(c)]


def attach(model: Any) -> None:
    """Enables saving, loading and dequantizing for a transformers model that ``quantize_model`` has quantized."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or not any(True for _ in layers_of(model)):
        return
    embeddings = any(isinstance(m, Embedding4bit) for m in model.modules())
    config = QLoRAConfig(skip_modules=dense_names(model, embeddings), embeddings=embeddings)
    config.record(forms_of(model))
    compute_dtype = compute_dtype_of(model)
    if compute_dtype is not None and compute_dtype != model.config.dtype:
        config.compute_dtype = compute_dtype
    config.activations = activations_of(model)
    quantizer = QLoRAQuantizer(config, pre_quantized=True)
    quantizer.save_packed_state(model)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = METHOD
    model.config.quantization_config = config
    model.config._is_quantized = True


def save_in_our_format(model: Any) -> None:
    """Makes ``save_pretrained`` write the format of this package, also if the checkpoint of ``model`` has another one.

    Example:
        >>> def convert(path, directory):
        ...     model = AutoModelForCausalLM.from_pretrained(path, quantization_config=qlora_ext.QLoRAConfig())
        ...     qlora_ext.integrations.transformers.save_in_our_format(model)
        ...     model.save_pretrained(directory)  # which can be streamed from disk

    Raises:
        TypeError: ``model`` has not been loaded with ``QLoRAConfig``.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, QLoRAQuantizer):
        raise TypeError(f"model: expected a transformers model with 4-bit layers, got {type(model).__name__}")
    if not quantizer._saves_source:
        return
    quantizer.source = quantizer.qlora_config._source = None
    forget_mlx(model.config)
    quantizer.qlora_config.record(forms_of(model))
    quantizer.save_packed_state(model)


AFTER_QUANTIZE.append(attach)
register_quantization_config(METHOD)(QLoRAConfig)
register_quantizer(METHOD)(QLoRAQuantizer)
