"""What a fine-tuning run is asked for, and the run itself: the value that goes through all phases of the recipe."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..data import Example, Parts, is_preference
from ..models.sources import ModelSource
from ..options import DEFAULT_RUN
from ..outputs.directory import Output
from ..outputs.ownership import read_marker
from .identity import check_same
from .settings import Settings

if TYPE_CHECKING:
    import torch
    from rich.console import Console

SETTINGS = "settings.json"


@dataclasses.dataclass(frozen=True)
class Request:
    """What a user asks of a run.

    Attributes:
        options: the settings that were given. The others keep their defaults, or what a resumed run was begun with.
        output: the directory of the run.
        resume: go on with the run in ``output``, if it was begun.
        overwrite: replace what an earlier command wrote to ``output``.
        force: with ``resume``: go on over another base or other data than the run was begun with.
    """

    options: Mapping[str, Any]
    output: str = DEFAULT_RUN
    resume: bool = False
    overwrite: bool = False
    force: bool = False
    trust_remote_code: bool = False


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())


@dataclasses.dataclass
class Run:
    """A run, in a directory with ``settings.json``, checkpoints, ``metrics.jsonl``, ``loss.png`` and ``adapter/``.

    Attributes:
        resumes: whether the run was begun by an earlier command. longer: whether this one extends it.
        checkpoint: from which the run goes on.
        digests: of what a new run begins with, for its marker.
        tokenizer, parts, arguments: of the phase ``prepare``: rows to train on, and the trainer's arguments.
        model: of ``load``: 4-bit, with its adapter.
        trainer, before, history: of ``train``: what the untrained model measures and says, and the lines of
            ``metrics.jsonl``.
    """

    request: Request
    output: Output
    settings: Settings
    source: ModelSource
    device: torch.device
    examples: Sequence[Example]
    resumes: bool
    longer: bool
    checkpoint: pathlib.Path | None
    digests: dict[str, str] = dataclasses.field(default_factory=dict)
    console: Console = dataclasses.field(default_factory=_console)
    tokenizer: Any = None
    parts: Parts = dataclasses.field(init=False)
    arguments: Any = None
    model: Any = None
    trainer: Any = None
    before: dict[str, Any] = dataclasses.field(default_factory=dict)
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def preferences(self) -> bool:
        """Whether DPO is what the run does."""
        return self.settings.method != "sft" and is_preference(self.examples[0])

    @property
    def directory(self) -> pathlib.Path:
        return self.output.path

    @property
    def adapter(self) -> pathlib.Path:
        return self.directory / "adapter"

    @property
    def metrics(self) -> pathlib.Path:
        return self.directory / "metrics.jsonl"

    def report(self, line: str) -> None:
        self.console.print(line)

    def identify(self, what: str, digest: str, name: str) -> None:
        """Notes what a new run begins with, and checks that one that goes on has the same."""
        if self.resumes:
            check_same(self.directory, name, read_marker(self.directory).get(what), digest, self.request.force)
        else:
            self.digests[what] = digest
