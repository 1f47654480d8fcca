"""The functions of other libraries that we change, all of them: which, in which versions, and why.

Each is wrapped where its library is integrated (``extend``), which refuses a function that is not in this list. What a
library lets others register (quantizers of transformers, conversions of ours) is no patch and not here.
"""

from __future__ import annotations

import dataclasses
import functools
import pkgutil
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Patch:
    """A foreign ``function`` (``module:attribute``) that we change.

    Attributes:
        versions: of its library, in which we change it.
        why: what it does of itself.
        aliases: further names under which people import it.
    """

    function: str
    versions: str
    why: str
    aliases: tuple[str, ...] = ()


_LIST = (
    Patch(
        "transformers.modeling_utils:PreTrainedModel.num_parameters",
        "transformers >= 5.0",
        "counts the elements of tensors, of which a packed byte holds two; it knows bitsandbytes' class alone",
    ),
    Patch(
        "transformers.modeling_utils:PreTrainedModel.save_pretrained",
        "transformers >= 5.0",
        "writes nothing into the directory that tells people what a 4-bit model needs to load",
    ),
    Patch(
        "transformers.quantizers.auto:AutoHfQuantizer.merge_quantization_configs",
        "transformers >= 5.0",
        "refuses a configuration of another class than the checkpoint's, and ours also reads bitsandbytes'",
    ),
    Patch(
        "peft.tuners.lora:LoraModel._create_and_replace",
        "peft >= 0.19",
        'refuses lora_dropout where a parameter is a target, which "all-linear" makes of a router',
    ),
    Patch(
        "peft.tuners.lora:LoraModel._create_new_module",
        "peft >= 0.19",
        "finds the LoRA layer over a base by the classes that PEFT knows",
    ),
    Patch(
        "peft.tuners.tuners_utils:BaseTuner._create_and_replace",
        "peft >= 0.19; every method but LoRA overrides it, and each override is changed",
        "reads and writes the weight of the base as a dense one",
    ),
    Patch(
        "peft.tuners.tuners_utils:BaseTuner.merge_and_unload",
        "peft >= 0.19",
        "leaves layers without an adapter as they are: the merged model would be 4-bit in part",
    ),
    Patch(
        "peft.peft_model:PeftModel.get_nb_trainable_parameters",
        "peft >= 0.19",
        "counts as transformers' num_parameters does",
    ),
    Patch(
        "peft.mixed_model:PeftMixedModel.get_nb_trainable_parameters",
        "peft >= 0.19",
        "counts as transformers' num_parameters does",
    ),
    Patch(
        "peft.utils.other:ModulesToSaveWrapper.check_module",
        "peft >= 0.19",
        "asks for a gradient of packed bytes",
    ),
    Patch(
        "peft.peft_model:PeftModel.save_pretrained",
        "peft >= 0.19",
        "does not record which 4-bit base an adapter was trained on",
    ),
    Patch(
        "peft.peft_model:PeftModel.load_adapter",
        "peft >= 0.19",
        "puts an adapter on another base, or one that lacks weights, without a word",
    ),
    Patch(
        "peft.utils.loftq_utils:replace_lora_weights_loftq",
        "peft >= 0.19",
        "takes bitsandbytes' layers alone",
        aliases=("peft.utils:replace_lora_weights_loftq", "peft:replace_lora_weights_loftq"),
    ),
    Patch(
        "peft.utils.other:prepare_model_for_kbit_training",
        "peft >= 0.19",
        "turns gradient checkpointing on for the kinds of 4-bit model that it knows",
        aliases=("peft.utils:prepare_model_for_kbit_training", "peft:prepare_model_for_kbit_training"),
    ),
    Patch(
        "torch.distributed.fsdp._fully_shard._fsdp_param:FSDPParam.init_dtype_attrs",
        "torch >= 2.11",
        "casts float32 scales to the dtype of a MixedPrecisionPolicy and, before torch 2.13, packed bytes too",
    ),
    Patch(
        "torch.distributed.fsdp._fully_shard._fsdp_param:nn.Parameter",
        "torch < 2.13",
        "asks for a gradient of packed bytes (https://github.com/pytorch/pytorch/issues/177844)",
    ),
)
PATCHES = {patch.function: patch for patch in _LIST}


def _place(function: str) -> tuple[Any, str]:
    """What holds the function (a module or a class), and its name there."""
    module, _, path = function.partition(":")
    owner, _, name = path.rpartition(".")
    return pkgutil.resolve_name(f"{module}:{owner}" if owner else module), name


def extend(function: str, owner: type | None = None) -> Callable[[Any], Any]:
    """Has a function of ``PATCHES`` replaced by the decorated one, which takes the original as its first argument.

    Args:
        owner: the subclass whose override of the function is meant.
    """
    patch = PATCHES[function]

    def decorate(replacement: Any) -> Any:
        found, name = _place(function)
        holder: Any = owner or found
        original = getattr(holder, name)

        @functools.wraps(original, updated=() if isinstance(original, type) else functools.WRAPPER_UPDATES)
        def extended(*args: Any, **kwargs: Any) -> Any:
            return replacement(original, *args, **kwargs)

        static = isinstance(holder, type) and isinstance(vars(holder).get(name), staticmethod)
        for place, attribute in ((holder, name), *map(_place, patch.aliases)):
            setattr(place, attribute, staticmethod(extended) if static else extended)
        return replacement

    return decorate
