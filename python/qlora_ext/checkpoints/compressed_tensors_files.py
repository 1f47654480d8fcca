"""Writes 4-bit weights in the formats of compressed-tensors, for models that did not come from such a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._internal.scale_tables import e4m3_table
from ..form import Form
from ..weight import Weight4bit
from .compressed_tensors import MXFP4, NVFP4, Packed
from .format import Format

_ONE = 0x38  # the E4M3 code of 1
# Layers whose rows servers join into one weight, which has one factor.
_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def joined_layers(names: Iterable[str]) -> Iterator[list[str]]:
    """The layers ``names``, those together whose rows servers join."""
    known = dict.fromkeys(names)
    for name in known:
        parent, _, child = name.rpartition(".")
        joined = next((joined for joined in _JOINED if child in joined), (child,))
        group = [found for other in joined if (found := f"{parent}.{other}") in known]
        if name == group[0]:
            yield group


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of 4-bit weights.

    Attributes:
        format: of the tensors.
        form: of the weights.
        weights: its description in a configuration.
        has_factor: whether a weight has a factor, which programs that join the rows of layers need to be the same.
    """

    format: Format
    form: Form
    weights: dict[str, Any]
    has_factor: bool = False

    def config(self, dense: Sequence[str]) -> dict[str, Any]:
        """The ``quantization_config`` of a model whose linear layers are of this kind, except those named ``dense``."""
        group = {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "symmetric": True, "dynamic": False, **self.weights},
            "input_activations": None,
            "output_activations": None,
            "format": self.format.name,
        }
        return {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": self.format.name,
            "config_groups": {"group_0": group},
            "ignore": [*dense],
        }

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether each row of a weight, or of a stack of weights, of that shape consists of whole blocks."""
        return 0 not in shape and shape[-1] % self.form.block_size == 0

    def tensors(self, w4: Weight4bit, rows: Sequence[int]) -> list[dict[str, Tensor]]:
        """The tensors of the weights whose rows ``w4`` has joined.

        Args:
            w4: in ``form``.
            rows: how many rows each of them has.
        """
        settings = self.format.settings_of(self.config(()))
        retained = {"weight_global_scale": _factor(w4)} if self.has_factor else {}
        written = self.format.write(w4, settings, {})
        split = {name: tensor.split([*rows]) for name, tensor in written.items()}
        found = []
        for i, count in enumerate(rows):
            shape = {"weight_shape": torch.tensor([count, w4.shape[1]], dtype=torch.int64, device="cpu")}
            tensors = {name: parts[i].clone() for name, parts in split.items()}
            tensors |= {name: tensor.clone() for name, tensor in retained.items()}
            found.append(tensors | (shape if "weight_shape" in self.format.tensors(settings) else {}))
        return found


def _factor(w4: Weight4bit) -> Tensor:
    """The number by which the E4M3 scales of a quantized NVFP4 weight were divided, float32 [1]."""
    assert w4.scale_table is not None
    scales = e4m3_table(w4.device)
    one = 1.0 / w4.scale_table[_ONE]  # the number, or one of its neighbours
    found = (one, torch.nextafter(one, one + 1), torch.nextafter(one, one - 1))
    return next(factor for factor in found if torch.equal(scales / factor, w4.scale_table)).reshape(1)


_INT4, _NVFP4, _MXFP4 = (Form.named(name) for name in ("int4", "nvfp4", "mxfp4"))
KINDS = {
    "int4": Kind(Packed(), _INT4, {"type": "int", "strategy": "group", "group_size": _INT4.block_size}),
    "nvfp4": Kind(
        NVFP4(),
        _NVFP4,
        {
            "type": "float",
            "strategy": "tensor_group",
            "group_size": _NVFP4.block_size,
            "scale_dtype": "torch.float8_e4m3fn",
        },
        has_factor=True,
    ),
    "mxfp4": Kind(
        MXFP4(),
        _MXFP4,
        {"type": "float", "strategy": "group", "group_size": _MXFP4.block_size, "scale_dtype": "torch.uint8"},
    ),
}
