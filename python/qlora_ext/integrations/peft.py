"""PEFT (>= 0.19): LoRA on ``Linear4bit`` as one fused operator, with PEFT's own adapters, files and switches.

``get_peft_model`` and ``PeftModel.from_pretrained`` put a ``LoraLinear4bit`` where they find a ``Linear4bit``. This
module is imported by itself as soon as PEFT is, and adds to four of PEFT's functions: the choice of the LoRA layer,
``merge_and_unload``, ``prepare_model_for_kbit_training``, and saving and loading adapters (the base's fingerprint).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import os
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import peft.utils
import peft.utils.other
import torch
from peft.peft_model import PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Linear as DenseLoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..fingerprint import fingerprint
from ..nn import Linear4bit
from ..weight import NF4Weight, quantize_nf4

BASE_FILE = "qlora_base.json"
FORMAT_VERSION = 1

OnMismatch = Literal["refuse", "warn", "ignore"]
# What loading an adapter that was trained on another 4-bit base does, where the caller does not say.
on_base_mismatch: OnMismatch = "warn"


class LoraLinear4bit(DenseLoraLinear):
    """PEFT's LoRA layer over a ``Linear4bit``.

    One plain active adapter runs as the one operator y = x · Wᵀ + scaling · dropout(x) · Aᵀ · Bᵀ + bias. Whatever else
    PEFT can do (several active adapters, adapters by sample, DoRA and its kin, biases on B) runs by PEFT's own code,
    over the 4-bit layer or, where that code reads the weight itself, over a decoded one.
    """

    def __init__(self, base_layer: Linear4bit, adapter_name: str, config: Any, **kwargs: Any) -> None:
        if config.fan_in_fan_out:  # GPT-2's Conv1D is an ordinary [N, K] once it is 4-bit
            config = copy.copy(config)
            config.fan_in_fan_out = False
        self._unmerged: tuple[NF4Weight, Tensor | None] | None = None
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    @property
    def layer4bit(self) -> Linear4bit:
        layer = self.base_layer
        assert isinstance(layer, Linear4bit)
        return layer

    @contextlib.contextmanager
    def _dense_base(self, dtype: torch.dtype) -> Iterator[nn.Linear]:
        """The base layer decoded to an ``nn.Linear``, for the code of PEFT that reads and writes its weight."""
        layer = self.layer4bit
        dense = Linear4bit.to_linear(layer, dtype)
        self.base_layer = dense
        try:
            yield dense
        finally:
            self.base_layer = layer

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        init = config.init_lora_weights
        reads_weight = (isinstance(init, str) and init != "gaussian") or self.resolve_lora_variant(config=config)
        if not reads_weight:
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
            return
        with self._dense_base(torch.float32) as dense:
            before = dense.weight.detach().clone()
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        if not torch.equal(dense.weight, before):  # PiSSA and its kin keep what they took out of the base
            self._requantize(dense.weight)

    def _requantize(self, weight: Tensor) -> None:
        layer = self.layer4bit
        w4 = quantize_nf4(weight, layer.block_size, layer.double_quant, layer.nested_block_size)
        layer.set_weight(dataclasses.replace(w4, dtype=layer.weight_dtype))

    def _fused_adapter(self, kwargs: dict[str, Any]) -> str | None:
        """The adapter that the one operator can run, or None."""
        if self.disable_adapters or self.merged or any(value is not None for value in kwargs.values()):
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or active[0] in self.lora_variant or hasattr(self.base_layer, "_hf_hook"):
            return None
        plain = type(self.lora_A[active[0]]) is nn.Linear and type(self.lora_B[active[0]]) is nn.Linear
        return active[0] if plain and self.lora_B[active[0]].bias is None else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = self._fused_adapter(kwargs)
        if adapter is not None:
            dropout = self.lora_dropout[adapter]
            p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
            a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
            return self.layer4bit.fused_forward(x, a, b, self.scaling[adapter], p)
        if self.lora_variant and not self.disable_adapters and not self.merged:
            with self._dense_base(x.dtype):
                return self._unfused_forward(x, *args, **kwargs)
        return self._unfused_forward(x, *args, **kwargs)

    def _unfused_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = super().forward(x, *args, **kwargs)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters into the 4-bit weight, which is quantized anew; ``unmerge`` gives back the old bits."""
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        names = [*self.merged_adapters, *names]
        if self.merged:
            self.unmerge()
        layer = self.layer4bit
        kept = layer.weight4bit, None if layer.bias is None else layer.bias.detach().clone()
        dense = self._merge_dense(names, safe_merge)
        self._unmerged = kept
        self._requantize(dense.weight)
        if layer.bias is not None:
            layer.bias.data = dense.bias.detach().to(layer.bias.dtype)

    def _merge_dense(self, names: list[str], safe_merge: bool) -> nn.Linear:
        """The decoded layer in float32 with the named adapters merged into it by PEFT."""
        with self._dense_base(torch.float32) as dense:
            super().merge(safe_merge=safe_merge, adapter_names=names)
        return dense

    def unmerge(self) -> None:
        if not self.merged or self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        layer = self.layer4bit
        w4, bias = self._unmerged
        layer.set_weight(w4.to(layer.weight.device))
        if bias is not None:
            layer.bias.data = bias.to(layer.bias)
        self._unmerged = None
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The layer without its adapters: 4-bit as it was or, merged, dense in the dtype of the quantized weight."""
        layer = self.layer4bit
        if not merge:
            return layer
        names = list(self.merged_adapters)
        if self.merged:
            self.unmerge()
        names += [name for name in check_adapters_to_merge(self, adapter_names) if name not in names]
        if not names:
            return layer
        dense = self._merge_dense(names, safe_merge)
        merged = layer.to_linear(weight=dense.weight)
        if dense.bias is not None:
            merged.bias = nn.Parameter(dense.bias.detach().to(layer.weight_dtype), requires_grad=False)
        return merged

    def __repr__(self) -> str:
        return f"{super().__repr__()}".removeprefix("lora.")


@dataclasses.dataclass(frozen=True)
class MergeError:
    """What quantizing the merged weights to 4 bits again costs: ‖Q(W + ΔW) - (W + ΔW)‖ / ‖W + ΔW‖."""

    by_layer: dict[str, float]
    total: float


def merge_to_4bit(model: Any) -> tuple[nn.Module, MergeError]:
    """Merges the active adapters of a PEFT model into its 4-bit weights, and drops them.

    Returns:
        The base model, still 4-bit, and the relative error that each layer and all of them together took on.
    """
    by_layer: dict[str, float] = {}
    error = norm = 0.0
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLinear4bit):
            continue
        if layer.merged:
            layer.unmerge()
        names = check_adapters_to_merge(layer, None)
        if not names:
            continue
        exact = layer._merge_dense(names, False).weight
        layer.merged_adapters.clear()
        layer._requantize(exact)
        difference = (layer.layer4bit.dequantize(torch.float32) - exact).norm().item() ** 2
        size = exact.norm().item() ** 2
        by_layer[name.removeprefix("base_model.model.")] = (difference / size) ** 0.5 if size else 0.0
        error, norm = error + difference, norm + size
    base = model.unload()
    return base, MergeError(by_layer, (error / norm) ** 0.5 if norm else 0.0)


def write_base(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Records beside an adapter which 4-bit base it belongs to."""
    record = {"fingerprint": fingerprint(model), "format_version": FORMAT_VERSION}
    path = pathlib.Path(directory) / BASE_FILE
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def check_base(
    model: nn.Module, directory: str | os.PathLike[str], on_mismatch: OnMismatch | None = None
) -> bool | None:
    """Whether ``model`` is the 4-bit base that the adapter in ``directory`` was trained on.

    Args:
        on_mismatch: "refuse" raises a ValueError, "warn" warns, "ignore" only answers; ``on_base_mismatch`` if None.

    Returns:
        None where the adapter does not say (PEFT alone wrote it) or the model is not 4-bit.
    """
    path = pathlib.Path(directory) / BASE_FILE
    if not path.is_file() or not any(isinstance(m, Linear4bit) for m in model.modules()):
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    if record.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: expected format_version {FORMAT_VERSION}, got {record.get('format_version')!r}")
    found = fingerprint(model)
    if found == record["fingerprint"]:
        return True
    message = (
        f"{directory}: this adapter was trained on another 4-bit base: expected fingerprint "
        f"{record['fingerprint'][:12]}, got {found[:12]}"
    )
    action = on_mismatch or on_base_mismatch
    if action == "refuse":
        raise ValueError(message)
    if action == "warn":
        warnings.warn(message, stacklevel=2)
    return False


def _is_4bit(model: nn.Module) -> bool:
    return any(isinstance(m, Linear4bit) for m in model.modules())


def _extend(owner: Any, name: str) -> Any:
    """Replaces ``owner.name`` by the decorated function, which takes the original as its first argument."""
    original = getattr(owner, name)

    def decorate(function: Any) -> Any:
        @functools.wraps(original)
        def extended(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        static = isinstance(owner, type) and isinstance(vars(owner).get(name), staticmethod)
        setattr(owner, name, staticmethod(extended) if static else extended)
        return extended

    return decorate


@_extend(LoraModel, "_create_new_module")
def _create_new_module(original: Any, lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
    if isinstance(target, Linear4bit):
        return LoraLinear4bit(target, adapter_name, config=lora_config, **kwargs)
    return original(lora_config, adapter_name, target, **kwargs)


@_extend(LoraModel, "merge_and_unload")
def _merge_and_unload(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    has_4bit = any(isinstance(m, LoraLinear4bit) for m in self.model.modules())
    model = original(self, *args, **kwargs)
    if not has_4bit:
        return model
    # The merged layers are dense: so become those that had no adapter, for the model to be of one kind.
    if getattr(model, "hf_quantizer", None) is not None:
        return model.dequantize()
    from .transformers import dequantize_modules

    return dequantize_modules(model)


@_extend(peft.utils.other, "prepare_model_for_kbit_training")
def prepare_model_for_kbit_training(original: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    model = original(model, *args, **kwargs)
    # PEFT turns gradient checkpointing on for the kinds of 4-bit model that it knows.
    if _is_4bit(model) and (args[0] if args else kwargs.get("use_gradient_checkpointing", True)):
        options = (args[1] if len(args) > 1 else kwargs.get("gradient_checkpointing_kwargs")) or {}
        if options.get("use_reentrant", True):
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model


peft.utils.prepare_model_for_kbit_training = prepare_model_for_kbit_training
peft.prepare_model_for_kbit_training = prepare_model_for_kbit_training


@_extend(PeftModel, "save_pretrained")
def _save_pretrained(original: Any, self: Any, save_directory: str, *args: Any, **kwargs: Any) -> Any:
    saved = original(self, save_directory, *args, **kwargs)
    if _is_4bit(self) and kwargs.get("is_main_process", True):
        names = kwargs.get("selected_adapters") or list(self.peft_config)
        for name in names:  # PEFT puts every adapter but the default one into a directory of its own
            directory = pathlib.Path(save_directory) / ("" if name == "default" else name)
            if (directory / "adapter_config.json").is_file():
                write_base(self, directory)
    return saved


@_extend(PeftModel, "load_adapter")
def _load_adapter(original: Any, self: Any, model_id: str, *args: Any, **kwargs: Any) -> Any:
    check_base(self, pathlib.Path(model_id) / (kwargs.get("subfolder") or ""))
    return original(self, model_id, *args, **kwargs)
