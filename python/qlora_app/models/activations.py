"""``--activations``: whether 4-bit layers round their inputs to int8, and what ``auto`` means on this processor."""

from __future__ import annotations

import sys
from typing import Any

from qlora_ext.dtype_names import AUTO
from qlora_ext.formats import EXACT, INT8
from qlora_ext.untrusted import excerpt

from ..errors import UserError
from ..options import ACTIVATIONS

# The instruction sets that multiply int8 at twice their rate for other numbers, whatever the code of the weights. AVX2
# gains 1.2 times with some codes and many tokens only (docs/benchmarks.md), and AMX nothing by count
# (docs/cpu_roofline.md).
_FAST = ("avx_vnni", "avx512", "avx512_bf16", "neon_dotprod", "neon_bf16", "neon_i8mm")


def _auto(isa: str) -> tuple[str, str]:
    """What ``auto`` means on the CPU with that instruction set, and why."""
    if isa in _FAST:
        return INT8, f"{isa} multiplies int8 fast"
    return EXACT, f"{isa} gains little by int8"


def set_activations(model: Any, wanted: str, device: str) -> None:
    """Sets ``activations`` of the 4-bit layers of ``model`` to a value of ``--activations``, and reports a choice.

    Args:
        device: the type of the device that computes.

    Raises:
        UserError: a recorded value is none of ``ACTIVATIONS``.
    """
    from qlora_ext import QLoRAConfig, build_info
    from qlora_ext.nn import layers_of

    if wanted not in ACTIVATIONS:
        raise UserError(f"activations: expected {', '.join(ACTIVATIONS)}, got {excerpt(wanted)}")
    layers = [layer for _, layer in layers_of(model)]
    chosen = wanted
    if device != "cpu" and wanted != EXACT:
        chosen, why = EXACT, f"4-bit layers compute exactly on {device}"
    elif wanted == AUTO:
        chosen, why = _auto(build_info()["cpu_isa"])
    if chosen != wanted:
        print(f"qlora-ext: --activations {wanted}: {chosen}, because {why}", file=sys.stderr)
    for layer in layers:
        layer.activations = chosen
    config = getattr(model.config, "quantization_config", None)
    if isinstance(config, QLoRAConfig):
        config.activations = chosen  # which is saved with the model
