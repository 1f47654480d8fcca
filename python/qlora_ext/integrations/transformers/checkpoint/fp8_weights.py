"""Weights in FP8 beside 4-bit ones: they are decoded, stay dense, and are saved as they were."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ....untrusted import excerpt, printable
from .headers import Header, Names
from .stored_weights import Matrix

# Dtypes of safetensors that hold codes, not values.
_CODES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "U8", "I8", "I16", "I32", "U32")
_DENSE = ("F32", "F16", "BF16")
_TENSORS = ("weight", "weight_scale", "input_scale")
_CHUNK = 1 << 18  # elements that are decoded at a time


class ScaledWeight(Matrix):
    """A weight of the model that the checkpoint stores in FP8 with a scale. It is decoded, and stays dense."""

    def read(self, by_key: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The decoded weight.

        Raises:
            ValueError: it has another shape, or scales of an unknown kind.
        """
        given = {name: by_key[key] for name, key in self.tensors.items()}
        weight, scale = given["weight"], given["weight_scale"]
        if weight.shape != torch.Size(shape):
            raise ValueError(f"{self.where}: expected weight to be {list(shape)}, got {list(weight.shape)}")
        if not scale.is_floating_point() or scale.numel() not in (1, shape[0]):
            raise ValueError(
                f"{self.where}: expected weight_scale to be one floating-point number, or one per row, got "
                f"{scale.dtype} {list(scale.shape)}"
            )
        self.retained = {
            key: t.to("cpu", copy=True) for name, key in self.tensors.items() if (t := given[name]) is not weight
        }
        out = torch.empty_like(weight, dtype=dtype)
        rows = max(1, _CHUNK // weight[0].numel())
        factors = self._factor(scale).expand(len(weight), 1)
        for target, codes, factor in zip(out.split(rows), weight.split(rows), factors.split(rows), strict=True):
            target.copy_(codes.float() * factor)
        return out

    def write(self, values: Tensor) -> dict[str, Tensor]:
        """The tensors for ``values``, the stored ones unless they were trained."""
        factor = self._factor(self.retained[self.tensors["weight_scale"]]).to(values.device)
        return {self.tensors["weight"]: (values.float() / factor).to(torch.float8_e4m3fn), **self.retained}

    def _factor(self, scale: Tensor) -> Tensor:
        return scale.float().reshape(-1, 1)


def scaled_weights(names: Names, headers: Mapping[str, Header]) -> dict[str, ScaledWeight]:
    """The weights in FP8 with one scale, or one per row, by their names in the model.

    Args:
        headers: of the tensors that belong to no 4-bit weight.

    Raises:
        ValueError: another tensor holds codes where the model has values, or transformers joins a weight in FP8 with
            others.
    """
    found: dict[str, ScaledWeight] = {}
    for key, header in headers.items():
        target, pattern = names.place(key)
        if header.dtype not in _CODES or target is None or not names.has_values(target):
            continue
        module, _, name = key.rpartition(".")
        tensors = {part: f"{module}.{part}" for part in _TENSORS if f"{module}.{part}" in headers}
        where = f"{printable(header.file)}: {excerpt(key, 200)}"
        scale = headers[tensors["weight_scale"]] if "weight_scale" in tensors else None
        rows = header.shape[:1]
        has_factors = scale is not None and scale.shape in ((), (1,), rows, (*rows, 1))
        if (name, header.dtype) != ("weight", "F8_E4M3") or pattern is not None or not has_factors:
            raise ValueError(
                f"{where}: expected values, 4-bit codes, or FP8 values of a linear layer with a weight_scale for the "
                f"tensor or for each row, got {header.dtype} {list(header.shape)}"
                + ("" if scale is None else f" with weight_scale {list(scale.shape)}")
            )
        found[target] = ScaledWeight(where, tensors)
    if found:
        dense = [
            key for key, h in headers.items() if h.dtype in _DENSE and len(h.shape) > 1 and key.endswith(".weight")
        ]
        warnings.warn(
            f"{len(found)} weights that the checkpoint stores in FP8 are decoded and dense, and {len(dense)} that it "
            "does not quantize stay as they are",
            stacklevel=2,
        )
    return found
