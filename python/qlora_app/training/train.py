"""The third phase of a run: trains from the first step, or the last checkpoint, to the last step."""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
from typing import Any

from ..models.adapter_files import find
from ..models.sources import PACKAGE
from ..outputs.files import need_space, write_json
from ..terminal.progress import ProgressCallback, describe, show_sample
from .checkpoints import checkpoints, step_of
from .measuring import measure_before
from .restoring import optimizer_overrides
from .run import SETTINGS, Run
from .settings import read_settings
from .trainer import NameInertAdapters, QLoRATrainer, RunTrainer, run_trainer, training_arguments


def _trainer_of(method: str) -> type[RunTrainer]:
    """The trainer of a method. Those of sft and distill work without TRL."""
    if method == "sft":
        return QLoRATrainer
    if method == "grpo":
        from .rewards import RewardTrainer

        return RewardTrainer
    if method == "distill":
        from .distillation import DistillationTrainer

        return DistillationTrainer
    from .preferences import LabelTrainer, PreferenceTrainer

    return LabelTrainer if method == "kto" else PreferenceTrainer


def arguments_of(run: Run) -> Any:
    """The arguments of the trainer for prepared rows, whose construction checks them."""
    s, trainer = run.settings, _trainer_of(run.method)
    steps, more = s.steps(len(run.parts.train)), trainer.more_arguments(s)
    return training_arguments(s, steps, run.directory, run.device, trainer.kind, **more)


def train(run: Run) -> None:
    """Trains a loaded run whose directory exists.

    Raises:
        UserError: the disk is full, the memory is too small, or the checkpoint is damaged.
        KeyboardInterrupt: the user stopped the run; the message says how to resume it.
    """
    # A checkpoint has the adapter and two moments. Up to three checkpoints exist at once, and the adapter at the end.
    trainable_bytes = sum(p.nbytes for p in run.model.parameters() if p.requires_grad)
    need_space(run.directory, 10 * trainable_bytes + (4 << 20), "the run's checkpoints")
    with optimizer_overrides():
        _train(run)


def _train(run: Run) -> None:
    s = run.settings
    run.trainer = _trainer_of(run.method)(run)
    before = measure_before(run)
    run.before = {"step": 0, **{f"eval_{key}": before[key] for key in before if key not in ("prompt", "sample")}}
    progress = ProgressCallback(run.console, run.metrics, run.before)
    run.trainer.add_callback(progress)
    run.trainer.add_callback(NameInertAdapters(run.report))
    if run.longer:
        run.report(f"extending the run to {f'{s.epochs:g} epochs' if s.epochs else f'{s.max_steps} steps'}")
    run.report(f"held-out {describe(run.before)} before training ({len(run.parts.held_out)} examples)")
    show_sample(run.console, "before training", before["prompt"], before["sample"])
    if run.checkpoint:
        run.report(f"resuming after step {step_of(run.checkpoint)}")
    elif run.request.resume:
        run.report("no checkpoint yet: starting at step 0")
    try:
        run_trainer(run)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_interrupted(run)) from None
    finally:
        progress.close()


def begin(run: Run) -> None:
    """Creates the directory of a loaded run, after everything that can be checked was checked."""
    path = run.directory / SETTINGS
    if run.longer:
        lengths = {key: getattr(run.settings, key) for key in (run.settings.longer, "former_steps")}
        write_json(path, {**read_settings(path), **lengths})
    if run.resumes:
        return
    with run.output.written("finetune", **run.digests) as partial:
        write_settings(run, partial)


def write_settings(run: Run, directory: pathlib.Path) -> None:
    """Records the settings of a new run, with absolute paths, in ``directory``."""
    recorded = {**dataclasses.asdict(run.settings), "model": run.source.name}
    path = pathlib.Path(run.settings.data).expanduser()
    if not run.settings.data.startswith(PACKAGE) and path.exists():
        recorded["data"] = str(path.resolve())
    if run.teacher_source is not None:
        recorded["teacher"] = run.teacher_source.name
    if run.settings.teacher_cache:
        recorded["teacher_cache"] = str(pathlib.Path(run.settings.teacher_cache).expanduser().resolve())
    if run.settings.init_adapter:
        recorded["init_adapter"] = str(find(run.settings.init_adapter).resolve())
    write_json(directory / SETTINGS, recorded)


def _interrupted(run: Run) -> str:
    saved = checkpoints(run.directory)
    at = f"step {step_of(saved[-1])} is saved" if saved else "no checkpoint was saved yet"
    again = shlex.join(["qlora-ext", "finetune", "--output", str(run.sweep or run.directory), "--resume"])
    return f"{at}; continue with: {again}"
