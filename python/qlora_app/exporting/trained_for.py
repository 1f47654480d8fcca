"""The format for which an adapter was trained merge-aware, and whether a target is in it."""

from __future__ import annotations

import pathlib
import sys

from ..models.adapter_files import find
from .targets import TARGETS, ExportRequest


def _format_of(to: str) -> str:
    """The format of the 4-bit weights of a target, which keeps those of merge-aware training for it."""
    return "nf4" if to in ("nf4", "bitsandbytes") else to.partition(":")[2]


def trained_for(adapter: pathlib.Path | None) -> str | None:
    """The format that ``finetune --merge-aware FORMAT`` named; None without one.

    Raises:
        FileError: the adapter's record is damaged.
    """
    from qlora_ext.integrations.peft.base_file import recorded_merge_aware

    found = False if adapter is None else recorded_merge_aware(adapter)
    return found if isinstance(found, str) else None


def warn_of_other_format(request: ExportRequest) -> None:
    """Says that a target changes the weights of merge-aware training, and which one keeps them."""
    to, code = request.to, trained_for(None if request.adapter is None else find(request.adapter))
    if code is not None and to != "nf4" and _format_of(to) != code:  # that one retains the format of the base
        way = "--to" if request.command == "export" else "export --to"
        targets = " or ".join(f"{way} {name}" for name in TARGETS if _format_of(name) == code)
        print(
            f"qlora-ext: {request.typed}: the adapter was trained for {code}, so the loss of the result will differ "
            f"from the trained one; use {targets} to keep the weights that were trained",
            file=sys.stderr,
        )
