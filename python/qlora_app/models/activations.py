"""``--activations``: whether 4-bit layers round their inputs to int8, and what ``auto`` means on this processor."""

from __future__ import annotations

import sys
from typing import Any

from qlora_ext.dtype_names import AUTO
from qlora_ext.formats import EXACT, INT8
from qlora_ext.untrusted import excerpt

from ..errors import UserError
from ..options import ACTIVATIONS

# The instruction sets that multiply int8 at twice their rate for other numbers, whatever the code of the weights.
_FAST = ("avx_vnni", "avx512", "avx512_bf16", "neon_dotprod", "neon_bf16", "neon_i8mm")
# AVX2 adds several products in 16 bits, which hold those of small integers only.
_SMALL_INTEGERS = frozenset(("int4", "uint4", "e2m1"))


def _auto(isa: str, codes: set[str]) -> tuple[str, str]:
    """What ``auto`` means for weights of these codes on the CPU with that instruction set, and why."""
    if isa in _FAST:
        return INT8, f"{isa} multiplies int8 fast"
    if isa == "avx2" and codes <= _SMALL_INTEGERS:
        return INT8, f"{isa} multiplies int8 fast by codes that are small integers"
    if isa == "amx_bf16":
        return EXACT, f"{isa} multiplies bfloat16 as fast as int8 and its scales"
    return EXACT, f"{isa} does not multiply int8 fast by the codes {', '.join(sorted(codes))}"


def set_activations(model: Any, wanted: str, device: str) -> None:
    """Sets ``activations`` of the 4-bit layers of ``model`` to a value of ``--activations``, and reports a choice.

    Args:
        device: the type of the device that computes.

    Raises:
        UserError: a recorded value is none of ``ACTIVATIONS``.
    """
    from qlora_ext import QLoRAConfig, build_info
    from qlora_ext.nn import Embedding4bit, layers_of

    if wanted not in ACTIVATIONS:
        raise UserError(f"activations: expected {', '.join(ACTIVATIONS)}, got {excerpt(wanted)}")
    layers = [layer for _, layer in layers_of(model)]
    chosen = wanted
    if device != "cpu" and wanted != EXACT:
        chosen, why = EXACT, f"4-bit layers compute exactly on {device}"
    elif wanted == AUTO:
        codes = {layer.form.code for layer in layers if not isinstance(layer, Embedding4bit)}  # of products
        chosen, why = _auto(build_info()["cpu_isa"], codes)
    if chosen != wanted:
        print(f"qlora-ext: --activations {wanted}: {chosen}, because {why}", file=sys.stderr)
    for layer in layers:
        layer.activations = chosen
    config = getattr(model.config, "quantization_config", None)
    if isinstance(config, QLoRAConfig):
        config.activations = chosen  # which is saved with the model
