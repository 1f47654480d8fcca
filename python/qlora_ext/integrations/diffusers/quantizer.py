"""``DiffusersQLoRAQuantizer``: quantizes the layers of a diffusers model while its checkpoint is loaded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn
from transformers.quantizers.quantizers_utils import should_convert_module

from ..._library import cuda_is_usable
from ...bitsandbytes_format import COMPANIONS
from ...nn import (
    CONVERSIONS,
    Embedding4bit,
    Linear4bit,
    Packed4bit,
    TiedLinear4bit,
    is_dense,
    is_fused_experts,
    layers_of,
    paths_to,
    places_in,
    quantized,
    tied_heads,
    to_be_quantized,
)
from ...streaming import stream
from ...weight import NF4Weight, Weight4bit
from ..transformers import METHOD, QLoRAConfig
from ..transformers.modules import dense_names, dequantize_modules, forms_of

_ALIGNMENT = 64  # bytes, of torch's allocations on a CPU
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class DiffusersQLoRAQuantizer(DiffusersQuantizer):
    """Puts 4-bit modules into a diffusers model that is being loaded.

    With a dense checkpoint, each layer is replaced when its weight is read, so only one dense weight is in memory at a
    time. With a 4-bit checkpoint, empty 4-bit modules are inserted first and then filled.
    """

    use_keep_in_fp32_modules = True
    is_serializable = True
    is_trainable = True
    is_compileable = True

    def __init__(self, quantization_config: QLoRAConfig, **kwargs: Any) -> None:
        super().__init__(copy.copy(quantization_config), **kwargs)  # each model records its own layers
        self.config: QLoRAConfig = self.quantization_config
        self.reads_bitsandbytes = self.pre_quantized and self.config._bitsandbytes_storage is not None
        self.config._bitsandbytes_storage = None  # the model will be saved in our format
        self.torch_dtype: torch.dtype | None = None
        self.streaming_device: Any = None
        # For a dense checkpoint: the layers that are not quantized yet, by the names of their weights.
        self.awaited: dict[str, nn.Module] = {}
        # For a bitsandbytes checkpoint: layers with tensors in a file that has not been read yet.
        self.incomplete: dict[str, tuple[Packed4bit, dict[str, Tensor]]] = {}
        self.target_device: Any = None

    def validate_environment(self, *args: Any, torch_dtype: Any = None, device_map: Any = None, **kwargs: Any) -> None:
        if torch_dtype not in (None, *_DTYPES):
            raise ValueError(f"dtype: expected float32, bfloat16 or float16 for a 4-bit model, got {torch_dtype}")
        places = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map}
        if "disk" in places:
            raise ValueError(
                "device_map: expected no layers on disk, which diffusers cannot read back in 4 bits; to load a model "
                "that was saved in 4 bits from disk block by block, use QLoRAConfig(stream='disk')"
            )
        if self.config.stream is not None and len(places) > 1:
            raise ValueError(f"device_map: expected one device for a streamed model, got {device_map}")
        if self.config.stream == "disk" and (not self.pre_quantized or self.reads_bitsandbytes):
            raise ValueError("stream: 'disk' needs a 4-bit model saved by qlora_ext; use stream='ram' for others")

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        self.torch_dtype = torch_dtype
        return torch_dtype

    def update_device_map(self, device_map: Any) -> Any:
        # A quantized model goes to the GPU if there is one, as in transformers and for bitsandbytes.
        if device_map is None and cuda_is_usable():
            device_map = {"": torch.cuda.current_device()}
        if self.config.stream is None or not isinstance(device_map, Mapping):
            return device_map
        self.streaming_device = next(iter(device_map.values()))
        return {"": "cpu"}

    def adjust_target_dtype(self, target_dtype: torch.dtype) -> Any:
        from accelerate.utils import CustomDtype

        return CustomDtype.INT4  # accelerate computes the device_map from it

    def _options(self, module: nn.Module) -> dict[str, Any]:
        """The compute dtype and the form of the 4-bit module that replaces ``module``, as keywords."""
        dense: torch.dtype = module.weight.dtype  # type: ignore[assignment]
        compute_dtype = self.config.computing_dtype(self.torch_dtype or dense)
        return {"compute_dtype": compute_dtype, **self.config.form.keywords}

    def _selected(self, model: nn.Module, float32_names: list[str]) -> Iterator[tuple[str, nn.Module]]:
        """The modules to replace by 4-bit ones, and their names."""
        if self.pre_quantized and not self.reads_bitsandbytes:  # the configuration lists all dense modules
            dense = set(self.config.skip_modules or [])
            for name, module in list(model.named_modules()):
                is_kind = is_dense(module) and (self.config.embeddings or not isinstance(module, nn.Embedding))
                if is_kind and dense.isdisjoint(paths_to(name)):
                    yield name, module
            return
        if self.follows_bitsandbytes:
            yield from linear_layers_of_bitsandbytes(model, [*(self.config.skip_modules or []), *float32_names])
            return
        patterns = self.config.skip_modules
        heads = tied_heads(model)
        chosen = to_be_quantized(model, None if patterns is None else (), self.config.embeddings, towers=True)
        for module, name in chosen.items():
            if not all(should_convert_module(path, patterns) for path in paths_to(name)):
                continue
            if not is_fused_experts(module) and not heads.get(module):  # type: ignore[call-overload]
                yield name, module

    @property
    def supports_parallel_loading(self) -> bool:
        return not self.reads_bitsandbytes  # because one weight may be spread over several files

    @property
    def follows_bitsandbytes(self) -> bool:
        """Whether to quantize exactly the layers that bitsandbytes would quantize."""
        return self.reads_bitsandbytes

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any = None, keep_in_fp32_modules: list[str] | None = None, **kwargs: Any
    ) -> None:
        if "state_dict" in kwargs:  # from_single_file, which passes every file as pre-quantized
            if any(key.endswith(".absmax") for key in kwargs["state_dict"]):
                raise ValueError("from_single_file: expected a dense checkpoint; load a 4-bit one with from_pretrained")
            self.pre_quantized = False
        self.places = places_in(model)
        for name, module in list(self._selected(model, keep_in_fp32_modules or [])):
            if self.pre_quantized:
                self._replace(module, self._empty(module))
            else:
                self.awaited[f"{name}.weight"] = module

    def _replace(self, module: nn.Module, new: Packed4bit) -> None:
        new.activations = self.config.activations
        for parent, name, _ in self.places.pop(module):  # popped, so that no reference keeps the dense weight
            setattr(parent, name, new)

    def _empty(self, module: nn.Module) -> Packed4bit:
        options: dict[str, Any] = {"device": "meta", **self._options(module)}
        layer: Packed4bit
        if isinstance(module, nn.Embedding):
            layer = Embedding4bit(module.num_embeddings, module.embedding_dim, module.padding_idx, **options)
        else:
            assert isinstance(module, nn.Linear)
            cls = CONVERSIONS[type(module)]
            layer = cls(module.in_features, module.out_features, bias=module.bias is not None, **options)
        layer.expose()  # diffusers loads tensors by the names in files
        layer.weight_dtype = self.torch_dtype or module.weight.dtype  # diffusers reads the model's dtype from it
        return layer

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        if not self.reads_bitsandbytes:
            return missing_keys
        packed = {f"{name}.{part}" for name, layer in layers_of(model) for part in layer.packed_state()}
        return [key for key in missing_keys if key not in packed]  # they have other names in the file

    def check_if_quantized_param(self, model: nn.Module, param_value: Any, param_name: str, *a: Any, **kw: Any) -> bool:
        if param_name in self.awaited:
            return True
        name, _, part = param_name.rpartition(".")
        module = model.get_submodule(name)
        return self.pre_quantized and isinstance(module, Packed4bit) and part in module.packed_state()

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: Mapping[str, Tensor],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self.pre_quantized:
            self._quantize(self.awaited.pop(param_name), param_name, param_value.to(target_device))
        elif self.reads_bitsandbytes:
            layer = model.get_submodule(param_name.rpartition(".")[0])
            assert isinstance(layer, Packed4bit)
            self.target_device = target_device
            self.incomplete[param_name] = (layer, {})
            self._complete(state_dict, unexpected_keys)
        else:
            name, _, part = param_name.rpartition(".")
            module = model.get_submodule(name)
            value = state_dict[param_name].to(target_device)  # param_value has been cast to torch_dtype
            if part in module._buffers:
                module._buffers[part] = value
            else:
                module._parameters[part] = nn.Parameter(value, requires_grad=False)

    def _quantize(self, module: nn.Module, name: str, weight: Tensor) -> None:
        options = self._options(module)
        module.weight = nn.Parameter(weight, requires_grad=False)
        try:
            self._replace(module, quantized(module, **options))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {str(error).removeprefix('w: ')}") from None

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        if not self.reads_bitsandbytes:
            return loaded_keys
        endings = tuple(f".weight.{companion}" for companion in COMPANIONS)
        return [key for key in loaded_keys if not key.endswith(endings)]  # otherwise diffusers reports them as unused

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        self._complete(state_dict)
        return state_dict

    def _complete(self, state_dict: Mapping[str, Tensor], unexpected_keys: list[str] | None = None) -> None:
        """Fills the layers from bitsandbytes' weights whose tensors are complete after this file."""
        for name, (layer, tensors) in list(self.incomplete.items()):
            for key in (name, *(f"{name}.{companion}" for companion in COMPANIONS)):
                if key in state_dict:
                    tensors[key] = state_dict[key]
                    if key in (unexpected_keys or []):
                        unexpected_keys.remove(key)  # type: ignore[union-attr]
            try:
                w4 = NF4Weight.from_bitsandbytes(tensors, name)
            except KeyError:  # the rest is in another file
                continue
            layer.set_packed("weight", w4.replace(dtype=layer.weight_dtype).to(self.target_device))
            del self.incomplete[name]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._check_loaded(model)
        for _, layer in layers_of(model):
            layer.join()
        del self.places
        align(model)
        self.describe(model)
        if model.quantization_method == METHOD:
            model.is_quantized = False  # diffusers does not cast a model where it is True
        if self.config.stream is not None:
            stream(model, self.config.resident, self.config.stream, self.streaming_device)
        return model

    def _check_loaded(self, model: nn.Module) -> None:
        """Rejects a checkpoint that lacks part of the state of a 4-bit layer, or holds it in another form."""
        absent = [*self.awaited, *self.incomplete]
        for name, layer in layers_of(model):
            absent += [f"{name}.{part}" for part, t in layer.packed_state().items() if t.is_meta]
            layer.check_form(prefix=f"{name}.")
        if absent:
            raise ValueError(
                f"{absent[0]}: the checkpoint does not hold this tensor of a 4-bit layer ({len(absent)} are missing)"
            )
        if not any(True for _ in layers_of(model)):
            warnings.warn(
                f"{type(model).__name__} stays dense: it has no linear layer that QLoRAConfig quantizes", stacklevel=2
            )

    def describe(self, model: Any) -> None:
        """Records in the model's configuration which layers are 4-bit, and in which form."""
        record(self.config, model)
        model.register_to_config(quantization_config=self.config)

    def _dequantize(self, model: Any) -> Any:
        dequantize_modules(model, model.dtype)
        model.is_quantized = False
        del model.quantization_method
        forget(model)
        return model


def linear_layers_of_bitsandbytes(model: nn.Module, skipped: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers that diffusers lets bitsandbytes quantize, by its own rule for names."""
    for name, module in model.named_modules():
        is_skipped = name.rpartition(".")[2] in skipped or any(f"{key}." in name or key == name for key in skipped)
        if type(module) in CONVERSIONS and not is_skipped:
            yield name, module


def align(model: nn.Module) -> None:
    """Copies the dense parameters whose address in a mapped file is not aligned like an allocation.

    The rounding of torch's float32 products on a CPU depends on the alignment of a weight, which differs between files.
    Without the copy, a saved model would compute other bits after loading.
    """
    for t in (*model.parameters(), *model.buffers()):
        if not isinstance(t, Weight4bit) and t.device.type == "cpu" and t.data_ptr() % _ALIGNMENT:
            t.data = t.data.clone()


def record(config: QLoRAConfig, model: nn.Module) -> None:
    """Records in ``config`` the dense layers of ``model``, and the form of the 4-bit ones.

    Raises:
        ValueError: a 4-bit module is of a kind that cannot be loaded again, or the layers differ in form.
    """
    for name, layer in layers_of(model):
        if not isinstance(layer, (Linear4bit, Embedding4bit)) or isinstance(layer, TiedLinear4bit):
            raise ValueError(
                f"{name}: expected 4-bit linear layers and embeddings in a diffusers model, got {type(layer).__name__}"
            )
    config.embeddings = any(isinstance(layer, Embedding4bit) for _, layer in layers_of(model))
    config.skip_modules = dense_names(model, config.embeddings)
    config.record(forms_of(model))
    if config.forms:
        name, form = next(iter(config.forms.items()))
        raise ValueError(f"{name}: expected an NF4 layer in a diffusers model, got {form}")


def forget(model: Any) -> None:
    """Removes the ``quantization_config`` from the configuration of a model that is dense again."""
    fields = {name: value for name, value in model.config.items() if name != "quantization_config"}
    model._internal_dict = type(model.config)(fields)


auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = QLoRAConfig
auto.AUTO_QUANTIZER_MAPPING[METHOD] = DiffusersQLoRAQuantizer
