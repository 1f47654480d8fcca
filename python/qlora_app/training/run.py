"""The request for a fine-tuning run, and the run itself, which all its phases share."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ..data import Example, Parts, is_labelled, is_preference
from ..errors import UserError
from ..models.sources import ModelSource
from ..options import DEFAULT_RUN
from ..outputs.directory import Output
from ..outputs.ownership import read_marker
from .reward_function import Reward
from .settings import Settings

if TYPE_CHECKING:
    import torch
    from rich.console import Console

SETTINGS = "settings.json"
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Request:
    """A user's request for a run.

    Attributes:
        options: the given settings. The others have their defaults, or the values of the resumed run.
        output: the directory of the run.
        resume: continue the run in ``output``, if there is one.
        overwrite: replace what an earlier command wrote to ``output``.
        force: with ``resume``, continue even if the base or the data have changed.
        trust_remote_code: run Python code that comes with the model.
        rewards: with the method grpo, the functions that score answers, or their names (``find_rewards``). The run does
            not record them, because whoever writes to its directory must not choose which code runs.
        sweep: several values of some options, see ``sweep_options``. ``output`` is then the directory of the sweep.
        configured: whether ``options`` come from a file, at least in part.
    """

    options: Mapping[str, Any]
    output: str = DEFAULT_RUN
    resume: bool = False
    overwrite: bool = False
    force: bool = False
    trust_remote_code: bool = False
    rewards: Sequence[str | Reward] = ()
    sweep: Mapping[str, list[Any]] | None = None
    configured: bool = False

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite exclude each other")
        if self.force and not self.resume:
            raise UserError("--force needs --resume: it accepts another base or other data")

    def begin_anew(self) -> None:
        """Reports that ``output`` has nothing to resume, so that a new run begins.

        Raises:
            UserError: the request does not say what to train, so that the name of ``output`` may be a mistake.
        """
        where = f"--resume: --output {self.output} has no run to continue"
        if not (self.configured or self.options.keys() & {"model", "data"}):
            raise UserError(f"{where}; to begin a new one, give --model, --data or --config")
        print(f"{where}: a new one begins", flush=True)


@dataclasses.dataclass(frozen=True)
class Finetuned:
    """A finished run.

    Attributes:
        directory: of the run, with ``metrics.jsonl`` and ``loss.png``.
        adapter: the directory of the PEFT adapter, inside ``directory``.
        metrics: ``steps``, and the measurements on the held-out rows, such as ``perplexity_before`` and
            ``perplexity_after``.
    """

    directory: pathlib.Path
    adapter: pathlib.Path
    metrics: dict[str, float]


class Shared:
    """What the runs of a sweep have in common, such as the examples in the same data. It is computed once."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Any] = {}

    def once(self, key: Hashable, compute: Callable[[], _T]) -> _T:
        """The result of ``compute`` for ``key``."""
        if key not in self._found:
            self._found[key] = compute()
        found: _T = self._found[key]
        return found


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())


@dataclasses.dataclass
class Run:
    """A run, in a directory with ``settings.json``, checkpoints, ``metrics.jsonl``, ``loss.png`` and ``adapter/``.

    Attributes:
        resumes: whether an earlier command started the run.
        longer: whether this command extends the run.
        checkpoint: the checkpoint from which the run resumes.
        digests: of a new run's inputs, for its marker.
        rewards: of a run with the method grpo.
        teacher_source, vocabulary: with the method distill, set by ``prepare``: where the teacher is, and how many
            tokens both models predict.
        shared: with the other runs of a sweep.
        sweep: the directory of the sweep that the run belongs to.
        tokenizer, parts, arguments: set by ``prepare``: the tokenizer, the rows, and the trainer's arguments.
        model, teacher: set by ``load``: the 4-bit model with its adapter, and with the method distill a model, or a
            ``TeacherCache``.
        trainer, before, history: set by ``train``: the trainer, the measurements before training, and the lines of
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
    shared: Shared = dataclasses.field(default_factory=Shared)
    sweep: pathlib.Path | None = None
    console: Console = dataclasses.field(default_factory=_console)
    rewards: Sequence[Reward] = ()
    teacher_source: ModelSource | None = None
    vocabulary: int = 0
    tokenizer: Any = None
    parts: Parts = dataclasses.field(init=False)
    arguments: Any = None
    model: Any = None
    teacher: Any = None
    trainer: Any = None
    before: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def method(self) -> str:
        """The method of the run: that of its settings, or the one that its data are for."""
        if self.settings.method != "auto":
            return self.settings.method
        first = self.examples[0]
        return "dpo" if is_preference(first) else "kto" if is_labelled(first) else "sft"

    @property
    def preferences(self) -> bool:
        """Whether the run learns which answers are preferred (DPO), or good (KTO)."""
        return self.method in ("dpo", "kto")

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
        """Records the digest of an input of a new run, or checks that of a resumed run.

        Args:
            what: its key in the marker of the directory.
            name: of the input, for the message.

        Raises:
            UserError: the input differs from the recorded one, or none was recorded. With ``force``, a note is printed.
        """
        if not self.resumes:
            self.digests[what] = digest
            return
        recorded = read_marker(self.directory).get(what)
        if recorded == digest:
            return
        run = self.directory
        if isinstance(recorded, str) and re.fullmatch("[0-9a-f]{64}", recorded):
            problem = f"{name} differs from what the run {run} started with ({digest[:12]}, recorded {recorded[:12]})"
        else:
            problem = f"the run {run} does not record which {name.split()[0].lstrip('-')} it started with"
        if not self.request.force:
            raise UserError(f"--resume: {problem}; add --force to continue anyway, or start over in another --output")
        print(f"--force: continuing, although {problem}", flush=True)
