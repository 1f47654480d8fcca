"""The list of all functions of other libraries that we patch, with the versions and the reasons.

The integrations apply the patches with ``extend``, which rejects a function that is not listed here. Public extension
points of a library, such as transformers' registry of quantizers, are not patches.
"""

from __future__ import annotations

import dataclasses
import functools
import pkgutil
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Patch:
    """A patched ``function`` of another library.

    Attributes:
        function: its name, as ``module:attribute``.
        versions: the versions of the library in which it is patched.
        why: what the original does.
        aliases: other names under which users import it.
    """

    function: str
    versions: str
    why: str
    aliases: tuple[str, ...] = ()


_LIST = (
    Patch(
        "transformers.modeling_utils:PreTrainedModel.dtype",
        "transformers >= 5.0",
        "returns the dtype of the first floating parameter, which may be the scales of a 4-bit layer",
    ),
    Patch(
        "transformers.modeling_utils:PreTrainedModel.save_pretrained",
        "transformers >= 5.0",
        "writes no model card that says what a 4-bit model needs to load",
    ),
    Patch(
        "transformers.modeling_utils:safe_save_file",
        "transformers >= 5.0",
        "needs all tensors of a file in memory, but those of a 4-bit checkpoint are converted one by one",
    ),
    Patch(
        "transformers.quantizers.auto:AutoHfQuantizer.merge_quantization_configs",
        "transformers >= 5.0",
        "rejects a configuration of another class than the checkpoint's, but ours also reads bitsandbytes'",
    ),
    Patch(
        "transformers.modeling_utils:get_hf_quantizer",
        "transformers >= 5.0",
        "ignores configurations in other files and of unknown methods, and refuses to quantize GGUF files",
    ),
    Patch(
        "gguf.gguf_reader:GGUFReader._get",
        "gguf >= 0.17",
        "returns a memmap, each of which takes a kilobyte, and the metadata has one per token",
    ),
    Patch(
        "diffusers.quantizers.auto:DiffusersAutoQuantizer.merge_quantization_configs",
        "diffusers >= 0.35",
        "uses the checkpoint's configuration, so that a bitsandbytes checkpoint loads bitsandbytes' layers",
    ),
    Patch(
        "diffusers.models.modeling_utils:ModelMixin.save_pretrained",
        "diffusers >= 0.35",
        "writes 4-bit layers without the configuration needed to load them, or under an adapter's names",
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
        aliases=("peft.utils:replace_lora_weights_loftq", "peft:replace_lora_weights_loftq"),
    ),
    Patch(
        "peft.utils.hotswap:hotswap_adapter_from_state_dict",
        "peft >= 0.19",
        "writes to the data of parameters, which neither version counters nor hooks notice, so that a merge-aware "
        "layer does not merge again",
    ),
    Patch(
        "peft.utils.other:prepare_model_for_kbit_training",
        "peft >= 0.19",
        "enables gradient checkpointing only for the 4-bit models that it knows; where a model has the attribute that "
        "it reads, is_loaded_in_4bit, other code expects bitsandbytes' layers",
        aliases=("peft.utils:prepare_model_for_kbit_training", "peft:prepare_model_for_kbit_training"),
    ),
    Patch(
        "torch.export._trace:_export",
        "torch >= 2.11",
        "keeps parameters whose inner tensors a strict export has made constants, so that a file has them twice",
    ),
    Patch(
        "torch.onnx:export",
        "torch >= 2.11",
        "fails for packed layers, with long errors that do not name them",
    ),
    Patch(
        "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState.__init__",
        "torch >= 2.11",
        "shards each parameter as one tensor of its own shape, so 4-bit layers have to expose their tensors before",
    ),
    Patch(
        "accelerate.hooks:AlignDevicesHook.init_hook",
        "accelerate >= 1.10",
        "moves parameters by their names in the state, so 4-bit layers have to expose their tensors meanwhile",
    ),
    Patch(
        "accelerate.hooks:AlignDevicesHook.pre_forward",
        "accelerate >= 1.10",
        "moves parameters as AlignDevicesHook.init_hook does",
    ),
    Patch(
        "accelerate.hooks:AlignDevicesHook.post_forward",
        "accelerate >= 1.10",
        "moves parameters as AlignDevicesHook.init_hook does",
    ),
    Patch(
        "accelerate.hooks:AlignDevicesHook.detach_hook",
        "accelerate >= 1.10",
        "moves parameters as AlignDevicesHook.init_hook does",
    ),
    Patch(
        "torch.distributed.fsdp._fully_shard._fsdp_param:FSDPParam.init_dtype_attrs",
        "torch >= 2.11",
        "casts float32 scales to the dtype of a MixedPrecisionPolicy and, before torch 2.13, packed bytes too",
    ),
    Patch(
        "torch.distributed.fsdp._fully_shard._fsdp_param:nn.Parameter",
        "torch < 2.13",
        "requests a gradient of packed bytes (https://github.com/pytorch/pytorch/issues/177844)",
    ),
)
PATCHES = {patch.function: patch for patch in _LIST}


def _place(function: str) -> tuple[Any, str]:
    """The module or class that has the function as an attribute, and the attribute's name."""
    module, _, path = function.partition(":")
    owner, _, name = path.rpartition(".")
    return pkgutil.resolve_name(f"{module}:{owner}" if owner else module), name


def extend(function: str, optional: bool = False) -> Callable[[Any], Any]:
    """Replaces a function of ``PATCHES`` by the decorated one, which gets the original as its first argument.

    Of a property, it replaces the function that reads it.

    Args:
        optional: do nothing in versions of the library that lack the function.
    """
    patch = PATCHES[function]

    def decorate(replacement: Any) -> Any:
        try:
            holder, name = _place(function)
            attribute = getattr(holder, name)
        except (ImportError, AttributeError):
            if not optional:
                raise
            return replacement
        is_property = isinstance(attribute, property)
        original: Any = attribute.fget if is_property else attribute

        @functools.wraps(original, updated=() if isinstance(original, type) else functools.WRAPPER_UPDATES)
        def extended(*args: Any, **kwargs: Any) -> Any:
            return replacement(original, *args, **kwargs)

        static = isinstance(holder, type) and isinstance(vars(holder).get(name), staticmethod)
        kind = property if is_property else staticmethod if static else None
        setattr(holder, name, extended if kind is None else kind(extended))
        for place, alias in map(_place, patch.aliases):
            if vars(place).get(alias) is original:
                setattr(place, alias, extended)
        return replacement

    return decorate
