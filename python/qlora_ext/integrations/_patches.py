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
        "diffusers.quantizers.auto:DiffusersAutoQuantizer.merge_quantization_configs",
        "diffusers >= 0.35",
        "takes the checkpoint's configuration, and bitsandbytes' would load bitsandbytes' layers",
    ),
    Patch(
        "diffusers.models.modeling_utils:ModelMixin.save_pretrained",
        "diffusers >= 0.35",
        "writes 4-bit layers without a configuration by which they could be loaded, or under an adapter's names",
    ),
    Patch(
        "diffusers.models.modeling_utils:ModelMixin.to",
        "diffusers >= 0.35",
        "refuses to cast a quantized model, and our layers keep their bits",
    ),
    Patch(
        "diffusers.models.modeling_utils:ModelMixin.half",
        "diffusers >= 0.35",
        "refuses as ModelMixin.to does",
    ),
    Patch(
        "diffusers.models.modeling_utils:ModelMixin.float",
        "diffusers >= 0.35",
        "refuses as ModelMixin.to does",
    ),
    Patch(
        "diffusers.models.modeling_utils:ModelMixin.num_parameters",
        "diffusers >= 0.35",
        "counts as transformers' num_parameters does",
    ),
    Patch(
        "diffusers.models.modeling_utils:get_parameter_dtype",
        "diffusers >= 0.35",
        "takes the first floating parameter for the model's dtype, which may be the float32 scales of a 4-bit layer",
    ),
    Patch(
        "diffusers.models.attention:AttentionMixin.fuse_qkv_projections",
        "diffusers >= 0.35",
        "concatenates packed bytes, and fails with an error about gradients",
    ),
    Patch(
        "diffusers.models.attention_processor:Attention.fuse_projections",
        "diffusers >= 0.35",
        "concatenates as AttentionMixin.fuse_qkv_projections does",
    ),
    Patch(
        "diffusers.loaders.lora_pipeline:FluxLoraLoaderMixin._calculate_module_shape",
        "diffusers >= 0.35",
        "takes the shape of the packed bytes for the layer's, and knows bitsandbytes' class alone",
    ),
    Patch(
        "diffusers.loaders.lora_pipeline:_maybe_dequantize_weight_for_expanded_lora",
        "diffusers >= 0.35",
        "takes the packed bytes for the weight, and knows bitsandbytes' class alone",
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
        "peft.utils.other:cast_mixed_precision_params",
        "peft >= 0.19",
        "casts packed bytes to a floating-point dtype",
        aliases=("peft.utils:cast_mixed_precision_params", "peft:cast_mixed_precision_params"),
    ),
    Patch(
        "peft.tuners.lora.conversion:convert_to_lora",
        "peft >= 0.19, where there is one",
        "reads base weights as dense ones",
        aliases=("peft.tuners.lora:convert_to_lora", "peft.tuners:convert_to_lora", "peft:convert_to_lora"),
    ),
    Patch(
        "peft.tuners.lora.intruders:reduce_intruder_dimension",
        "peft >= 0.19, where there is one",
        "reads base weights as dense ones",
    ),
    Patch(
        "peft.tuners.lora.corda:preprocess_corda",
        "peft >= 0.19, where it can be imported",
        "reads base weights as dense ones",
    ),
    Patch(
        "peft.tuners.frod.model:FrodModel._init_frod_projections",
        "peft >= 0.19, where there is one",
        "reads base weights as dense ones",
    ),
    Patch(
        "peft.helpers:KappaTuneSelector._compute_kappas",
        "peft >= 0.19, where there is one",
        "reads base weights as dense ones",
    ),
    Patch(
        "peft.tuners.lora.loraga:preprocess_loraga",
        "peft >= 0.19, where there is one",
        "asks for gradients of packed bytes",
        aliases=("peft.tuners.lora:preprocess_loraga", "peft.tuners:preprocess_loraga", "peft:preprocess_loraga"),
    ),
    Patch(
        "torch.onnx:export",
        "torch >= 2.11",
        "fails for packed layers after pages of errors that do not name them",
    ),
    Patch(
        "torch.optim.swa_utils:AveragedModel.update_parameters",
        "torch >= 2.11",
        "averages packed bytes, which are codes and no numbers",
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


def extend(function: str, owner: type | None = None, optional: bool = False) -> Callable[[Any], Any]:
    """Has a function of ``PATCHES`` replaced by the decorated one, which takes the original as its first argument.

    Args:
        owner: the subclass whose override of the function is meant.
        optional: some versions of the library lack the function, and nothing is changed there.
    """
    patch = PATCHES[function]

    def decorate(replacement: Any) -> Any:
        try:
            found, name = _place(function)
            holder: Any = owner or found
            original = getattr(holder, name)
        except (ImportError, AttributeError):
            if not optional:
                raise
            return replacement

        @functools.wraps(original, updated=() if isinstance(original, type) else functools.WRAPPER_UPDATES)
        def extended(*args: Any, **kwargs: Any) -> Any:
            return replacement(original, *args, **kwargs)

        static = isinstance(holder, type) and isinstance(vars(holder).get(name), staticmethod)
        setattr(holder, name, staticmethod(extended) if static else extended)
        for place, alias in map(_place, patch.aliases):
            if vars(place).get(alias) is original:
                setattr(place, alias, extended)
        return replacement

    return decorate
