"""The entries that our directories may contain, file by file. All others are foreign and never deleted."""

from __future__ import annotations

import pathlib
import re
import stat
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

from qlora_ext.untrusted import Schema, read_json

from ..errors import UserError
from .files import contents

Written: TypeAlias = Callable[[str], bool]  # whether a command wrote the file of that relative name

# The file in every directory that a command writes, with the command and its files or settings.
MARKER = "qlora_output.json"
MANIFEST = "manifest.json"  # in a checkpoint, the list of its files; see checkpoints.py
RECORD = "qlora_run.json"  # in an adapter that finetune wrote
_MARKER: Schema = {"command?": str, "files?": [str], "waiting?": str, "output?": str, "runs?": [str]}
# Files of a run, which also has adapter/, checkpoint-N/, and the event files of --report-to tensorboard.
_RUN = frozenset({"settings.json", "before.json", "metrics.jsonl", "loss.png", MARKER})
SWEEP = "sweep.json"  # in the directory of a sweep, which also has a run per adapter; its marker lists their names
_SWEEP = frozenset({SWEEP, "loss.png", MARKER})
_EVENTS = re.compile(r"[^/]+/events\.out\.tfevents\.[^/]+")
_CHECKPOINT = re.compile(r"checkpoint-\d+")
# Files of adapters and checkpoints that have no list of their files: from earlier versions, or damaged.
_SAVED_BY_PEFT = frozenset({"README.md", "adapter_config.json", "adapter_model.safetensors", "qlora_base.json"})
_SAVED_BY_TRAINER = re.compile(
    r"optimizer\.(pt|bin)|scheduler\.pt|scaler\.pt|trainer_state\.json|training_args\.bin|rng_state(_\d+)?\.pth|"
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|chat_template\.jinja"
)
# The kinds of intermediate results in OUTPUT.KIND, and the names of their files (waiting.py).
WAITING = {
    "weights": re.compile(r"[0-9a-f]{32}\.safetensors"),
    "calibration": re.compile(r"calibration\.json|tokens\.safetensors|[0-9a-f]{16}\.(safetensors|done)"),
}


def read_marker(directory: pathlib.Path) -> dict[str, Any]:
    """The marker of ``directory``: the command and its files or settings. Empty if there is no marker.

    Raises:
        UserError: the marker is damaged.
    """
    path = directory / MARKER
    marker: dict[str, Any] = read_json(path, _MARKER) if path.is_file() and not path.is_symlink() else {}
    return marker


def is_ours(directory: pathlib.Path) -> bool:
    """Whether ``directory`` has a marker of a command. It may still have foreign files."""
    try:
        return "command" in read_marker(directory)
    except UserError:
        return False


def foreign_in(directory: pathlib.Path, written: Written) -> str | None:
    """The relative name of the first foreign entry below ``directory``; None if there is none.

    Foreign entries are links, files that are not regular, empty directories, and files that ``written`` rejects.
    """
    left = contents(directory)[::-1]
    while left:
        path = left.pop()
        name, mode = path.relative_to(directory).as_posix(), path.lstat().st_mode
        if stat.S_ISDIR(mode):
            inner = sorted(path.iterdir(), reverse=True)
            if not inner:
                return name
            left += inner
        elif not stat.S_ISREG(mode) or not written(name):
            return name
    return None


def _listed(path: pathlib.Path, of: Callable[[Any], Any]) -> set[str]:
    """The names that a record lists; empty if it is missing or damaged."""
    try:
        names = of(read_json(path, dict)) if path.is_file() else ()
    except UserError:
        return set()
    return {name for name in names or () if isinstance(name, str)}


def _saved_with_adapter(adapter: pathlib.Path) -> Written:
    listed = _listed(adapter / RECORD, lambda record: record.get("files"))
    return {*(listed or _SAVED_BY_PEFT), RECORD}.__contains__


def _saved_with_checkpoint(checkpoint: pathlib.Path) -> Written:
    listed = {*_listed(checkpoint / MANIFEST, lambda manifest: manifest), *_SAVED_BY_PEFT, MANIFEST}
    return lambda name: name in listed or bool(_SAVED_BY_TRAINER.fullmatch(name))


def foreign_in_adapter(adapter: pathlib.Path) -> str | None:
    """The first entry in the directory of a run's adapter that the run did not write."""
    return foreign_in(adapter, _saved_with_adapter(adapter))


def foreign_in_checkpoint(checkpoint: pathlib.Path) -> str | None:
    """The first entry in a checkpoint that the run did not write. Without a manifest, every entry counts."""
    if not (checkpoint / MANIFEST).is_file():
        return next((path.name for path in contents(checkpoint)), ".")
    return foreign_in(checkpoint, _saved_with_checkpoint(checkpoint))


def _written(files: Collection[str], directories: Mapping[str, Written]) -> Written:
    """Accepts ``files``, and below each of ``directories`` what its function accepts."""

    def written(name: str) -> bool:
        first, _, rest = name.partition("/")
        return directories[first](rest) if rest and first in directories else name in files

    return written


def _written_by_run(run: pathlib.Path) -> Written:
    saved = {path.name: _saved_with_checkpoint(path) for path in run.iterdir() if _CHECKPOINT.fullmatch(path.name)}
    events: Written = lambda name: bool(_EVENTS.fullmatch(name))  # noqa: E731
    return _written(_RUN, {**saved, "adapter": _saved_with_adapter(run / "adapter"), "runs": events})


def foreign_in_output(directory: pathlib.Path) -> str | None:
    """The first entry of a directory with a marker that the command named in the marker did not write.

    Raises:
        UserError: the marker is damaged, or belongs to an unfinished output.
    """
    marker = read_marker(directory)
    if marker.get("command") == "finetune":
        return foreign_in(directory, _written_by_run(directory))
    if marker.get("command") == "sweep":
        runs = [directory / name for name in marker.get("runs") or ()]
        return foreign_in(directory, _written(_SWEEP, {run.name: _written_by_run(run) for run in runs if run.is_dir()}))
    if "files" not in marker or "waiting" in marker:
        raise UserError(f"{MARKER} is damaged, or belongs to an unfinished output")
    return foreign_in(directory, {*marker["files"], MARKER}.__contains__)


def may_be_unfinished(command: str | None, name: str) -> bool:
    """Whether a command writes an entry of that name into its output later, so that a kill may leave it unfinished.

    The runs of a sweep are written together with it.
    """
    if command == "finetune":
        return name in _RUN or name == "adapter" or bool(_CHECKPOINT.fullmatch(name))
    return command == "sweep" and name in _SWEEP


def is_result(kind: str) -> Written:
    """Recognizes the files of intermediate results of a kind, "weights" or "calibration"."""
    return lambda name: name == MARKER or bool(WAITING[kind].fullmatch(name))
