"""A run's checkpoints. Each has a manifest of its files, which detects incomplete and changed checkpoints."""

from __future__ import annotations

import pathlib
import re
from typing import Any

from qlora_ext.untrusted import read_json

from ..errors import UserError, first_line
from ..outputs.files import write_json
from ..outputs.ownership import MANIFEST
from .identity import digest_of_files


def _describe(path: pathlib.Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": digest_of_files(path)}


def write_manifest(checkpoint: pathlib.Path) -> None:
    """Records name, size and SHA-256 of every file in ``checkpoint``, which has no subdirectories."""
    write_json(checkpoint / MANIFEST, {path.name: _describe(path) for path in sorted(checkpoint.iterdir())})


def _damage(checkpoint: pathlib.Path) -> str | None:
    """A description of the damage of a checkpoint; None if it is intact."""
    if not (checkpoint / MANIFEST).is_file():
        return f"there is no {MANIFEST}"
    try:
        manifest = read_json(checkpoint / MANIFEST)
    except UserError:
        return f"{MANIFEST} cannot be read"
    names = manifest if isinstance(manifest, dict) else {}
    if "trainer_state.json" not in names or not all(re.fullmatch(r"[\w.-]+", name, re.ASCII) for name in names):
        return f"{MANIFEST} is not a list of its files"
    for name, recorded in manifest.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        try:
            found = _describe(path)
        except OSError as error:
            return f"{name} cannot be read ({first_line(error)})"
        if not isinstance(recorded, dict) or recorded.get("size") != found["size"]:
            return f"{name} has another size than when it was saved"
        if recorded != found:
            return f"{name} has another content than when it was saved"
    return None


def step_of(checkpoint: pathlib.Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoints(run: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in run.iterdir() if re.fullmatch(r"checkpoint-[0-9]{1,18}", path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def newest_checkpoint(run: pathlib.Path) -> pathlib.Path | None:
    """The checkpoint from which a run resumes; None if none was due yet.

    Raises:
        UserError: the newest checkpoint is damaged. An older one is not used silently.
    """
    *older, newest = [None, *checkpoints(run)]
    damage = _damage(newest) if newest else None
    if damage is None:
        return newest
    intact = next((path for path in reversed(older) if path and not _damage(path)), None)
    if intact:
        advice = f"{intact.name} is complete: delete {newest.name if newest else ''} to continue from there"
    else:
        advice = "no other checkpoint is complete: start over with --overwrite"
    raise UserError(f"--resume: the checkpoint {newest} is damaged: {damage}; {advice}")
