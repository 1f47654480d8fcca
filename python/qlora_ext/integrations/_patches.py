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
        "peft.tuners.lora:LoraModel._create_and_replace",
        "peft >= 0.19",
        'refuses lora_dropout if a parameter is a target; "all-linear" targets the parameter of a router',
    ),
    Patch(
        "peft.tuners.lora:LoraModel._create_new_module",
        "peft >= 0.19",
        "chooses the LoRA layer by the class of the base, and does not know ours",
    ),
    Patch(
        "peft.tuners.lora.model:_adapter_names_pre_forward_hook",
        "peft >= 0.19",
        "gives the adapter_names of one thread's call to the calls of other threads",
    ),
    Patch(
        "peft.tuners.tuners_utils:BaseTunerLayer._get_base_layer_device_and_dtype",
        "peft >= 0.19",
        "has a loaded adapter rounded to the compute dtype of its layer before it is cast to float32",
    ),
    Patch(
        "peft.tuners.tuners_utils:BaseTuner._create_and_replace",
        "peft >= 0.19; every method but LoRA overrides it, and each override is patched",
        "reads and writes the weight of the base as a dense one",
    ),
    Patch(
        "peft.tuners.tuners_utils:BaseTuner.merge_and_unload",
        "peft >= 0.19",
        "does not change layers without an adapter, so the merged model would be partly 4-bit",
    ),
    Patch(
        "peft.peft_model:PeftModel._enable_peft_forward_hooks",
        "peft >= 0.19",
        "keeps the adapter_names of a call that raised for the next calls, and ignores them for most methods",
    ),
    Patch(
        "peft.utils.other:AuxiliaryTrainingWrapper.forward",
        "peft >= 0.19",
        "with adapter_names, asks the active adapters whether a module was trained, and fails for names without a copy",
    ),
    Patch(
        "peft.utils.other:ModulesToSaveWrapper.update",
        "peft >= 0.19",
        "trains a copy of a frozen weight in the 16 bits in which a float32 model stores it",
    ),
    Patch(
        "peft.tuners.trainable_tokens.layer:TrainableTokensLayer.update_layer",
        "peft >= 0.19",
        "rounds trained rows to the 16 bits in which a float32 model stores the table",
    ),
    Patch(
        "peft.utils.other:ModulesToSaveWrapper.check_module",
        "peft >= 0.19",
        "requests a gradient of a frozen weight, and the error does not tell that modules_to_save names it",
    ),
    Patch(
        "peft.peft_model:PeftModel.save_pretrained",
        "peft >= 0.19",
        "does not record which 4-bit base an adapter was trained on",
    ),
    Patch(
        "peft.peft_model:PeftModel.load_adapter",
        "peft >= 0.19",
        "loads an adapter of another base, or one that lacks weights, without a warning",
    ),
    Patch(
        "peft.utils.loftq_utils:replace_lora_weights_loftq",
        "peft >= 0.19",
        "supports bitsandbytes' layers only",
    ),
    Patch(
        "peft.utils.hotswap:hotswap_adapter_from_state_dict",
        "peft >= 0.19",
        "writes to the data of parameters, so that nothing tells a merge-aware layer to merge again",
    ),
    Patch(
        "peft.utils.other:prepare_model_for_kbit_training",
        "peft >= 0.19",
        "enables gradient checkpointing only for the 4-bit models that it knows",
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


def extend(function: str, owner: type | None = None) -> Callable[[Any], Any]:
    """Replaces a function of ``PATCHES`` by the decorated one, which gets the original as its first argument.

    Of a property, it replaces the function that reads it.

    Args:
        owner: the subclass whose override of the function is replaced.
    """
    if function not in PATCHES:
        raise KeyError(f"{function}: expected a function in the list of patches")

    def decorate(replacement: Any) -> Any:
        found, name = _place(function)
        holder: Any = owner or found
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
