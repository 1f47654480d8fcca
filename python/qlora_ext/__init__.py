"""QLoRA for PyTorch: frozen 4-bit NormalFloat weights and LoRA adapters in one fused operator, on CPU and CUDA."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from . import adapters, autograd, calibration, cpu, fidelity, merging, nn, streaming, transforms
from ._internal import hooks as _hooks
from ._internal.lazy import lazily as _lazily
from ._library import build_info
from .autograd import linear_nf4
from .calibration import Calibration
from .fidelity import check_model, sensitivity
from .form import Form
from .nn import quantize_model
from .weight import NF4Weight, Weight4bit, dequantize_nf4, quantize, quantize_nf4

if TYPE_CHECKING:
    from . import gguf
    from .integrations.bitsandbytes.adoption import adopt
    from .integrations.transformers import QLoRAConfig

__version__: str = build_info()["version"]
__all__ = [
    "Calibration",
    "Form",
    "NF4Weight",
    "QLoRAConfig",
    "Weight4bit",
    "adapters",
    "adopt",
    "autograd",
    "build_info",
    "calibration",
    "check_model",
    "cpu",
    "dequantize_nf4",
    "fidelity",
    "gguf",
    "linear_nf4",
    "nn",
    "quantize",
    "quantize_model",
    "quantize_nf4",
    "sensitivity",
    "streaming",
    "take_over_bitsandbytes",
]

assert merging  # it registers an operator on CUDA
assert transforms  # it registers vmap rules

# ``from_pretrained`` finds our quantizers in the libraries' registries. Everything else waits for ``integrate``.
_hooks.after_import("transformers.quantizers.auto", "qlora_ext.integrations.transformers")
_hooks.after_import("diffusers.quantizers.auto", "qlora_ext.integrations.diffusers.quantizer")


def take_over_bitsandbytes() -> None:
    """Makes ``BitsAndBytesConfig`` with NF4 load our layers from now on. FP4 and int8 still load bitsandbytes'.

    This applies to the ``BitsAndBytesConfig`` of transformers and of diffusers. For each model, one line on stderr says
    how many of its layers are ours. The model keeps its configuration and ``is_loaded_in_4bit``, its layers are also
    instances of ``bnb.nn.Linear4bit``, and it is saved in bitsandbytes' format.

    The environment variable ``QLORA_EXT_TAKE_OVER=1`` does the same when ``qlora_ext`` is imported. For programs that
    do not import it, use the command ``qlora-ext run -- COMMAND``.

    Example:
        >>> from transformers import AutoModelForCausalLM, BitsAndBytesConfig
        >>> qlora_ext.take_over_bitsandbytes()
        >>> config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")  # for from_pretrained
    """
    _hooks.after_import("transformers.modeling_utils", "qlora_ext.integrations.bitsandbytes.take_over")
    _hooks.after_import("diffusers.models.modeling_utils", "qlora_ext.integrations.diffusers.take_over")


if os.environ.get("QLORA_EXT_TAKE_OVER", "") not in ("", "0"):
    take_over_bitsandbytes()


# Names whose modules need optional libraries or are slow to import.
_DEFINED_IN = {
    "QLoRAConfig": ".integrations.transformers",
    "adopt": ".integrations.bitsandbytes.adoption",
    "gguf": ".",
}
_lazy, __dir__ = _lazily(__name__, _DEFINED_IN, __all__)


def __getattr__(name: str) -> Any:
    if name in ("decoding", "export", "finetune", "plan", "planning"):  # an ImportError, which `from` does not replace
        raise ImportError(f"qlora_ext.{name} moved: from qlora_app import {name}")
    return _lazy(name)
