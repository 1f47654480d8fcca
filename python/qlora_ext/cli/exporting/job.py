"""``Job``: an export that has been checked, and checks that several targets share."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from ..errors import UserError
from ..models.adapter_files import check_files


@dataclasses.dataclass(frozen=True)
class Job:
    """An export that the target can hold.

    Attributes:
        nbytes: the estimated size of the result.
        build: reads and merges the weights, and returns the function that writes the result to a path.
    """

    nbytes: int
    build: Callable[[], Callable[[pathlib.Path], None]]


def check_tied(target: str, adapter: pathlib.Path, model: Any) -> None:
    """Rejects an adapter on an output head that is tied to the embeddings, because merging it changes both.

    Args:
        target: the option and its value, for the error message.
        model: the dense base; it may be on the meta device.

    Raises:
        UserError: the adapter is on the head or on the embeddings.
    """
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not table.weight:
        return
    names = check_files(adapter)
    for layer, module in model.named_modules():
        if module in (head, table) and any(name.startswith(f"base_model.model.{layer}.") for name in names):
            raise UserError(
                f"{target}: the adapter {adapter} is on {layer}, and the model ties its output head to its embeddings, "
                "so that merging would change both; load the adapter with PEFT instead"
            )
