"""transformers (>= 5.0): ``QLoRAConfig`` and the quantizer behind ``from_pretrained(..., quantization_config=...)``.

Loading quantizes weight by weight as the checkpoint is read; a model directory saved afterwards holds the 4-bit state
and loads as such; one that bitsandbytes saved loads with ``QLoRAConfig()``. This module is imported by itself as soon
as transformers loads its own quantizers, so that ``import qlora_ext`` is enough for saved models to be recognised.
"""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import _library, ops
from ..nn import (
    AFTER_QUANTIZE,
    CONVERSIONS,
    Embedding4bit,
    Experts4bit,
    Linear4bit,
    Packed4bit,
    TiedLinear4bit,
    is_fused_experts,
    layers_of,
    paths_to,
    places_in,
    tied_heads,
)
from ..weight import NF4Weight, quantize_nf4
from ._mapped_files import MappedFiles
from ._modules import check_loaded, dense_names, dequantize_modules, record_form, refuse_split_experts, whole_experts
from .bitsandbytes import COMPANIONS

METHOD = "qlora_ext"
FORMAT_VERSION = 1


class Conv1D4bit(Linear4bit):
    """A ``Linear4bit`` in the place of GPT-2's ``Conv1D``, which stores its weight transposed: as [K, N]."""

    @classmethod
    def from_linear(cls, linear: Any, *args: Any, **options: Any) -> Linear4bit:
        if not isinstance(linear, Conv1D):
            raise TypeError(f"linear: expected a transformers Conv1D, got {type(linear).__name__}")
        k, n = linear.weight.shape
        dense = nn.Linear(k, n, bias=False, device="meta")
        dense.weight = nn.Parameter(linear.weight.detach().T, requires_grad=False)
        dense.bias = linear.bias
        return super().from_linear(dense.train(linear.training), *args, **options)

    def to_linear(self, dtype: torch.dtype | None = None, weight: torch.Tensor | None = None) -> Any:
        dense = super().to_linear(dtype, weight)
        with torch.device("meta"):
            conv = Conv1D(self.out_features, self.in_features)
        conv.weight = nn.Parameter(dense.weight.detach().T.contiguous(), requires_grad=False)
        conv.bias = dense.bias
        return conv.train(self.training)


CONVERSIONS[Conv1D] = Conv1D4bit


def _dtype_named(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"compute_dtype: expected a floating torch dtype or its name, got {dtype!r}")
    return dtype


class QLoRAConfig(QuantizationConfigMixin):
    """Quantize to NF4 while loading: ``from_pretrained(path, quantization_config=QLoRAConfig())``.

    Args:
        block_size: elements a scale: a power of two from 32 to 4096.
        double_quant: whether the scales are themselves held in 8 bits, in blocks of ``nested_block_size``.
        nested_block_size: scales a nested scale: from 1 to 2^20.
        compute_dtype: of the quantized layers' products and biases; the model's dtype by default.
        skip_modules: names of modules to leave as they are, with all that is in them: full names, last parts of
            them or regular expressions. By default the output head; with ``[]`` every linear layer is quantized.
            Layers whose weight is tied to an embedding's go with that embedding, whatever is said of them.
        embeddings: whether embeddings are quantized too, each with the output head that is tied to it.

    A checkpoint that is 4-bit already, ours or bitsandbytes' NF4, keeps its own block sizes and scale form.

    Raises:
        ValueError: an argument is not of the kind or outside of the bounds given here. TypeError: there is no such one.
    """

    def __init__(
        self,
        block_size: int = 64,
        double_quant: bool = True,
        nested_block_size: int = 256,
        compute_dtype: torch.dtype | str | None = None,
        skip_modules: list[str] | None = None,
        embeddings: bool = False,
        **saved: Any,
    ) -> None:
        ops.check_block_sizes(block_size, nested_block_size)
        for name, flag in (("double_quant", double_quant), ("embeddings", embeddings)):
            if not isinstance(flag, bool):
                raise ValueError(f"{name}: expected True or False, got {reprlib.repr(flag)}")
        names = skip_modules if isinstance(skip_modules, list | tuple | set) else [] if skip_modules is None else [None]
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"skip_modules: expected a list of names, got {reprlib.repr(skip_modules)}")
        if saved.pop("quant_method", METHOD) != METHOD:
            raise ValueError("quant_method: expected a configuration that qlora_ext saved")
        if saved.pop("format_version", FORMAT_VERSION) != FORMAT_VERSION:
            raise ValueError("format_version: this checkpoint needs a newer qlora_ext")
        if saved:
            raise TypeError(f"QLoRAConfig has no argument {', '.join(map(repr, saved))}")
        self.quant_method = METHOD
        self.format_version = FORMAT_VERSION
        self.block_size = block_size
        self.double_quant = double_quant
        self.nested_block_size = nested_block_size
        self.compute_dtype = _dtype_named(compute_dtype)
        self.skip_modules = None if skip_modules is None else list(skip_modules)
        self.embeddings = embeddings

    def to_dict(self) -> dict[str, Any]:
        fields = {key: value for key, value in vars(self).items() if not key.startswith("_")}
        if self.compute_dtype is not None:
            fields["compute_dtype"] = str(self.compute_dtype).removeprefix("torch.")
        return fields

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    @classmethod
    def from_bitsandbytes(cls, saved: dict[str, Any]) -> QLoRAConfig:
        """The configuration that reads a checkpoint which bitsandbytes quantized, from its ``quantization_config``.

        Raises:
            ValueError: an int8 or FP4 checkpoint, which has no NF4 weights.
        """
        if saved.get("load_in_8bit") or not saved.get("load_in_4bit", True):
            raise ValueError("quantization_config: expected a bitsandbytes NF4 checkpoint, got int8 (LLM.int8())")
        kind = saved.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' own default
        if kind != "nf4":
            shown = str(kind).upper()[:20]
            raise ValueError(f"quantization_config: expected a bitsandbytes NF4 checkpoint, got {shown}")
        storage = getattr(torch, str(saved.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch."), None)
        if not isinstance(storage, torch.dtype):
            found = reprlib.repr(saved["bnb_4bit_quant_storage"])
            raise ValueError(f"quantization_config: expected a torch dtype as bnb_4bit_quant_storage, got {found}")
        config = cls(
            double_quant=bool(saved.get("bnb_4bit_use_double_quant", False)),
            skip_modules=saved.get("llm_int8_skip_modules"),
        )
        config._bitsandbytes_storage = storage
        return config

    # The dtype that the packed bytes pose as in the checkpoint, where bitsandbytes wrote it.
    _bitsandbytes_storage: torch.dtype | None = None


def _tied_names(model: nn.Module) -> dict[str, str]:
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return tied


def _tied_modules(model: nn.Module) -> list[str]:
    tied = _tied_names(model)
    return sorted({name.removesuffix(".weight") for name in (*tied.keys(), *tied.values())})


class QLoRAQuantizer(HfQuantizer):
    """Puts ``Linear4bit`` into a model that transformers is about to load, and fills it."""

    requires_calibration = False
    quantization_config: QLoRAConfig

    def __init__(self, quantization_config: QLoRAConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.mapped_files = MappedFiles([])  # of the checkpoint that is being loaded
        self.not_finite: dict[str, str] = {}  # weights with NaN or infinity, and where
        self.conversions: list[Any] | None = None  # of names and weights, for a model that is dense again
        self.bitsandbytes_storage = quantization_config._bitsandbytes_storage
        quantization_config._bitsandbytes_storage = None  # what is saved from here on is ours

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        on_disk = isinstance(device_map, dict) and "disk" in device_map.values()
        if on_disk and (not self.pre_quantized or self.bitsandbytes_storage is not None):
            raise ValueError(
                "device_map: expected no layers on disk, where transformers looks for them in the checkpoint as it is; "
                "load and save the model in 4 bits first"
            )

    def update_device_map(self, device_map: Any) -> Any:
        # As for bitsandbytes: on a machine with a GPU, that is where a quantized model is wanted.
        if device_map is None and _library.cuda_error is None and torch.cuda.is_available():
            return {"": torch.cuda.current_device()}
        return device_map

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, Packed4bit) and name in module.packed_shapes

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        if self.param_needs_quantization(model, param_name):
            return 1  # the packed shape already counts bytes
        size: float = super().param_element_size(model, param_name, param)
        return size

    def _to_convert(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The modules that are to be 4-bit, with their names, but for tied heads, which go with their tables."""
        config = self.quantization_config
        fp32: list[str] = [*(getattr(model, "_keep_in_fp32_modules", None) or [])]
        skipped = {*self.get_modules_to_not_convert(model, config.skip_modules, fp32), *_tied_modules(model)}
        kept_tables = {*(config.skip_modules or []), *fp32}
        heads = tied_heads(model, _tied_names(model)) if config.embeddings else {}
        from_bitsandbytes = self.bitsandbytes_storage is not None  # where linear layers alone are 4-bit
        for name, module in list(model.named_modules()):
            if type(module) is nn.Embedding:
                patterns = kept_tables if module in heads and not from_bitsandbytes else None
            elif type(module) in CONVERSIONS or (is_fused_experts(module) and not from_bitsandbytes):
                patterns = skipped
            else:
                continue
            if patterns is not None and all(should_convert_module(path, sorted(patterns)) for path in paths_to(name)):
                yield name, module

    def _empty(self, module: nn.Module, model_dtype: torch.dtype) -> Packed4bit:
        """The 4-bit module that is to take ``module``'s place, on the meta device."""
        config = self.quantization_config
        options: dict[str, Any] = {
            "compute_dtype": config.compute_dtype or model_dtype,
            "block_size": config.block_size,
            "double_quant": config.double_quant,
            "nested_block_size": config.nested_block_size,
            "device": "meta",
        }
        if isinstance(module, nn.Embedding):
            return Embedding4bit(module.num_embeddings, module.embedding_dim, module.padding_idx, **options)
        cls = CONVERSIONS.get(type(module))
        if cls is None:
            return Experts4bit(module, **options)
        n, k = module.weight.shape  # type: ignore[misc]
        if cls is Conv1D4bit:
            n, k = k, n
        return cls(k, n, bias=module.bias is not None, **options)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        checkpoint_files = list(kwargs.get("checkpoint_files") or [])
        self.mapped_files = MappedFiles(checkpoint_files)
        if self.bitsandbytes_storage is not None and any(is_fused_experts(m) for m in model.modules()):
            refuse_split_experts(checkpoint_files)
        model_dtype: torch.dtype = model.config.dtype
        # transformers < 5.20 casts what it reads to the dtype found here, before it comes to us.
        as_read = self.bitsandbytes_storage or (None if self.pre_quantized else model_dtype)
        places, heads = places_in(model), tied_heads(model, _tied_names(model))
        for _, module in self._to_convert(model):
            layer = self._empty(module, model_dtype)
            for weight in layer.packed_shapes:
                if as_read is not None:
                    dense = getattr(layer, weight).to(as_read)
                    setattr(layer, weight, nn.Parameter(dense, requires_grad=False))
            new: dict[nn.Module, Packed4bit] = {module: layer}
            if isinstance(module, nn.Embedding):
                assert isinstance(layer, Embedding4bit)
                new |= {head: TiedLinear4bit(layer, head.bias) for head in heads[module]}
            for old, replacement in new.items():
                replacement._is_hf_initialized = True  # type: ignore[assignment]  # nothing to draw at random
                for parent, name, _ in places[old]:
                    setattr(parent, name, replacement)

    def get_quantize_ops(self) -> Any:
        from ._loading import Quantize

        return Quantize(self)

    def get_weight_conversions(self) -> list[Any]:
        if self.bitsandbytes_storage is None:
            return []
        from transformers.core_model_loading import WeightConverter

        from ._loading import LoadBitsandbytes

        sources = [*(f"weight.{name}" for name in COMPANIONS), "weight"]
        return [WeightConverter(sources, "weight", operations=[LoadBitsandbytes(self)])]

    def quantize(self, module: Packed4bit, weight: torch.Tensor) -> NF4Weight:
        """The 4-bit form of a checkpoint's dense ``weight`` for ``module``."""
        config = self.quantization_config
        if isinstance(module, Experts4bit):
            return module.quantize(weight)
        if isinstance(module, Conv1D4bit):
            weight = weight.T
        return quantize_nf4(weight, config.block_size, config.double_quant, config.nested_block_size)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.not_finite:
            name, where = next(iter(self.not_finite.items()))
            more = f" ({len(self.not_finite)} weights are such)" if len(self.not_finite) > 1 else ""
            raise ValueError(f"{name}: {where.removeprefix('w: ')}{more}")
        check_loaded(model)
        for _, layer in layers_of(model):
            layer.freeze_packed()  # transformers takes every floating parameter for a trainable one
        if self.bitsandbytes_storage is not None:
            # The model is saved in our format from now on: bitsandbytes' keys are not to be written again.
            conversions = getattr(model, "_weight_conversions", None) or []
            model._weight_conversions = [c for c in conversions if not _loads_bitsandbytes(c)]
            self.quantization_config.skip_modules = dense_names(model, embeddings=False)
            self.quantization_config.embeddings = False
        self.keep_experts_whole(model)
        record_form(model, self.quantization_config)
        return model

    def keep_experts_whole(self, model: Any) -> None:
        """Has ``save_pretrained`` write 4-bit experts as they are, not split into the files' original weights."""
        self.conversions = getattr(model, "_weight_conversions", None)
        names = [f"{name}.{w}" for name, m in layers_of(model) if isinstance(m, Experts4bit) for w in m.packed_shapes]
        if names:
            model._weight_conversions = whole_experts(model, self.conversions, names)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        model = dequantize_modules(model, dtype)
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


def _loads_bitsandbytes(conversion: Any) -> bool:
    from ._loading import LoadBitsandbytes

    return any(isinstance(op, LoadBitsandbytes) for op in getattr(conversion, "operations", ()))


def attach(model: Any) -> None:
    """Makes a transformers model that ``quantize_model`` has quantized save, load and dequantize as a 4-bit one."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or not any(True for _ in layers_of(model)):
        return
    embeddings = any(isinstance(m, Embedding4bit) for m in model.modules())
    config = QLoRAConfig(skip_modules=dense_names(model, embeddings), embeddings=embeddings)
    quantizer = QLoRAQuantizer(config, pre_quantized=True)
    quantizer.keep_experts_whole(model)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = METHOD
    model.config.quantization_config = config
    model.config._is_quantized = True
    record_form(model, config)


def _register() -> None:
    AFTER_QUANTIZE.append(attach)
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = QLoRAConfig
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = QLoRAQuantizer
    merge = auto.AutoHfQuantizer.merge_quantization_configs

    @functools.wraps(merge)
    def merge_quantization_configs(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        # A configuration passed by the caller must be of the checkpoint's class; ours also reads bitsandbytes'.
        if isinstance(quantization_config_from_args, QLoRAConfig):
            saved = quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()
            if saved.get("quant_method", "bitsandbytes") == "bitsandbytes":
                config = QLoRAConfig.from_bitsandbytes(saved)
                config.compute_dtype = quantization_config_from_args.compute_dtype
                return config
        return merge(quantization_config, quantization_config_from_args)

    auto.AutoHfQuantizer.merge_quantization_configs = staticmethod(merge_quantization_configs)


_register()
