"""The list of all functions of other libraries that we patch, with the versions and the reasons.

The integrations apply the patches with ``extend``, which rejects a function that is not listed here. Public extension
points of a library, such as transformers' registry of quantizers, are not patches.
"""

from __future__ import annotations

import dataclasses
import functools
import pkgutil
import sys
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Patch:
    """A patched ``function`` of another library.

    Attributes:
        function: its name, as ``module:attribute``.
        versions: the versions of the library in which it is patched.
        why: what the original does, and why no hook of the library serves.
    """

    function: str
    versions: str
    why: str


_LIST = (
    Patch(
        "transformers.modeling_utils:get_hf_quantizer",
        "transformers >= 5.0",
        "ignores configurations in other files and of unknown methods, rejects those of another class than ours, and "
        "refuses to quantize GGUF files; no registered quantizer is asked before",
    ),
    Patch(
        "transformers.modeling_utils:PreTrainedModel.dtype",
        "transformers >= 5.0",
        "returns the dtype of the first floating parameter, which may be a table stored in 16 bits, or the scales of "
        "an exposed layer; no quantizer is asked",
    ),
    Patch(
        "transformers.modeling_utils:safe_save_file",
        "transformers >= 5.0",
        "needs all tensors of a file in memory, but those of a 4-bit checkpoint are converted one by one; a quantizer "
        "gives tensors and metadata, and cannot write the file or the model card beside it",
    ),
    Patch(
        "gguf.gguf_reader:GGUFReader._get",
        "gguf >= 0.17",
        "returns a memmap, which takes a kilobyte, for each token in the metadata: three times the time and twice the "
        "memory; transformers creates the reader itself",
    ),
    Patch(
        "diffusers.quantizers.auto:DiffusersAutoQuantizer.merge_quantization_configs",
        "diffusers >= 0.35",
        "uses the checkpoint's configuration, so that a bitsandbytes checkpoint loads bitsandbytes' layers; its result "
        "chooses the quantizer",
    ),
    Patch(
        "diffusers.models.modeling_utils:ModelMixin.save_pretrained",
        "diffusers >= 0.35",
        "writes 4-bit layers without the configuration needed to load them, or under an adapter's names; a quantizer "
        "is asked after the configuration is written, and not at all if only parts of a model were quantized",
    ),
    Patch(
        "peft.tuners.tuners_utils:BaseTuner.inject_adapter",
        "peft >= 0.19",
        "chooses layers by the class of the base, and its methods read, write and merge dense weights only; layers can "
        "be registered for one LoraConfig, but not for all, nor for other methods",
    ),
    Patch(
        "peft.peft_model:PeftModel.save_pretrained",
        "peft >= 0.19",
        "does not record which 4-bit base an adapter was trained on; hooks on state dicts do not get the directory",
    ),
    Patch(
        "peft.peft_model:PeftModel.load_adapter",
        "peft >= 0.19",
        "loads an adapter of another base, or one that lacks weights, without a warning; hooks on state dicts do not "
        "get the directory",
    ),
    Patch(
        "peft.utils.loftq_utils:replace_lora_weights_loftq",
        "peft >= 0.19",
        "skips all layers that are not bitsandbytes', and calls no method of a layer",
    ),
    Patch(
        "peft.utils.hotswap:hotswap_adapter_from_state_dict",
        "peft >= 0.19",
        "writes to the data of parameters, which neither version counters nor hooks notice, so that a layer "
        "would still use what it has merged or stacked",
    ),
    Patch(
        "peft.utils.other:prepare_model_for_kbit_training",
        "peft >= 0.19",
        "enables gradient checkpointing only for the 4-bit models that it knows; where a model has the attribute that "
        "it reads, is_loaded_in_4bit, other code expects bitsandbytes' layers",
    ),
    Patch(
        "torch.export.exported_program:ExportedProgram.__init__",
        "torch >= 2.11",
        "keeps parameters whose inner tensors a strict export has made constants, so that a file has them twice; "
        "torch.export has no hook for the program that it returns",
    ),
    Patch(
        "torch.distributed.fsdp:fully_shard",
        "torch >= 2.11",
        "shards each parameter as one tensor of its own shape, so 4-bit layers have to expose their tensors before; it "
        "calls no method of a module or a tensor before it reads the names of the parameters",
    ),
    Patch(
        "torch.distributed.fsdp._fully_shard._fsdp_param:FSDPParam.init_dtype_attrs",
        "torch >= 2.11",
        "casts float32 scales to the dtype of a MixedPrecisionPolicy, which applies to all parameters of a module, and "
        "before torch 2.12 packed bytes too",
    ),
    Patch(
        "torch.distributed.fsdp._fully_shard._fsdp_param:nn.Parameter",
        "torch < 2.12",
        "requests a gradient of packed bytes (https://github.com/pytorch/pytorch/issues/177844), before any hook",
    ),
    Patch(
        "accelerate.hooks:AlignDevicesHook.init_hook",
        "accelerate >= 1.10",
        "moves parameters by their names in the state, so 4-bit layers have to expose their tensors meanwhile; "
        "dispatch_model and cpu_offload choose the class of the hook themselves",
    ),
)
PATCHES = {patch.function: patch for patch in _LIST}


def _place(function: str) -> tuple[Any, str]:
    """The module or class that has the function as an attribute, and the attribute's name."""
    module, _, path = function.partition(":")
    owner, _, name = path.rpartition(".")
    return pkgutil.resolve_name(f"{module}:{owner}" if owner else module), name


def _replace_imported(original: Any, extended: Any) -> None:
    """Replaces ``original`` in the modules that have imported it from its own, scripts of users among them."""
    for module in [*sys.modules.values()]:
        names = [name for name, value in [*getattr(module, "__dict__", {}).items()] if value is original]
        for name in names:
            setattr(module, name, extended)


def extend(function: str) -> Callable[[Any], Any]:
    """Replaces a function of ``PATCHES`` by the decorated one, which gets the original as its first argument.

    Of a property, it replaces the function that reads it.
    """
    if function not in PATCHES:
        raise KeyError(f"{function}: expected a function in the list of patches")

    def decorate(replacement: Any) -> Any:
        holder, name = _place(function)
        attribute = getattr(holder, name)
        is_property = isinstance(attribute, property)
        original: Any = attribute.fget if is_property else attribute

        @functools.wraps(original, updated=() if isinstance(original, type) else functools.WRAPPER_UPDATES)
        def extended(*args: Any, **kwargs: Any) -> Any:
            return replacement(original, *args, **kwargs)

        static = isinstance(holder, type) and isinstance(vars(holder).get(name), staticmethod)
        kind = property if is_property else staticmethod if static else None
        setattr(holder, name, extended if kind is None else kind(extended))
        if getattr(holder, "__name__", None) == original.__module__:  # a function that a module defines
            _replace_imported(original, extended)
        return replacement

    return decorate
