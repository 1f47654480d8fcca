"""``qlora-ext merge``: ``export`` to ``dense``, or with --4bit to ``nf4``, by an older name."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, ClassVar

from ..errors import UserError
from ..exporting.targets import MERGE_ERROR, ExportRequest
from ..options import REQUIRED, SavedOptions, add_options, like, option, options_in


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeRequest(ExportRequest):
    """What ``merge`` writes, and where to."""

    command: ClassVar[str] = "merge"

    adapter: str = like(SavedOptions, "adapter", default=REQUIRED)
    output: str = option(REQUIRED, "output directory", metavar="DIR")
    overwrite: bool = option(False, "replace what qlora-ext wrote to --output")
    four_bit: bool = option(False, "save in 4 bits", flag="--4bit")
    evaluate: bool = option(False, "compare the run's held-out loss before and after merging")
    # Of export, these are no options here.
    to: str = "dense"
    check: str = "none"
    data: str | None = None
    max_loss_increase: float | None = None
    embeddings: str | None = None

    @property
    def result(self) -> str:
        return "4 bits" if self.four_bit else self.dtype

    @property
    def typed(self) -> str:
        return "merge --4bit" if self.four_bit else "merge"


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "merge",
        help="save the adapter and its base as one model",
        description="Decodes the 4-bit base, adds the adapter, and saves the model in --dtype with its tokenizer: a "
        "directory that needs neither qlora_ext nor PEFT. With --4bit, the sum is quantized again under the scales of "
        "the base. Stochastic rounding preserves the update, although most of it is smaller than the distance between "
        f"two codes. {MERGE_ERROR} reports the error of each layer. Like export --to dense and --to nf4.",
    )
    add_options(parser, MergeRequest)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; see the module's text."""
    from ..exporting import export
    from ..exporting.export_check import HeldOutCheck

    request = options_in(MergeRequest, vars(arguments))
    if request.four_bit:
        request = dataclasses.replace(request, to="nf4")
    elif request.text != "none":
        raise UserError(f"{request.text_option} needs --4bit, because a dense model has no codes to choose")
    export.run(request, HeldOutCheck if request.evaluate else None)
    return 0
