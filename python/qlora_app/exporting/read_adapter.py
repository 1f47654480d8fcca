"""Reads a GGUF file with an adapter, to compare it with the adapter that was exported."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import UserError, reading
from .job import Factors

if TYPE_CHECKING:
    from ..gguf.adapter import Place


def read_adapter(
    trained: Mapping[str, Factors], places: Mapping[str, Sequence[Place]], path: pathlib.Path
) -> dict[str, tuple[Factors, Factors]]:
    """The factors of each layer, or stack of them, that were trained and in the file ``path``, float32.

    Args:
        trained: the factors in the adapter.
        places: where the layers are in the base's GGUF file.

    Raises:
        UserError: the file is damaged, or its tensors of one stack have different A.
    """
    import gguf
    import torch

    with reading("weights", str(path)):
        reader = gguf.GGUFReader(path)
        alpha = reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents()
        matrices = {tensor.name: torch.from_numpy(tensor.data.copy()).float() for tensor in reader.tensors}
        found = {}
        for layer, factors in trained.items():
            b = torch.empty_like(factors[1])
            for place in places[layer]:
                b[..., place.rows, :] = matrices[f"{place.tensor}.lora_b"]
            a, *others = (matrices[f"{place.tensor}.lora_a"] for place in places[layer])
            if not all(torch.equal(a, other) for other in others):
                raise UserError(f"{path}: the tensors of {layer} have different A")
            found[layer] = factors, (a, b, alpha / a.shape[-2])
    return found
