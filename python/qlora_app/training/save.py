"""The last phase of a run: saves the adapter, its record, and the metrics."""

from __future__ import annotations

import dataclasses
import datetime
import pathlib
import shlex
from typing import Any

from qlora_ext.formats import EXACT
from qlora_ext.untrusted import printable
from qlora_ext.version import VERSION

from ..outputs.files import staged_directory, write_json, write_json_lines
from ..outputs.ownership import RECORD, foreign_in_adapter
from ..terminal.progress import describe, is_measured, plot_loss, show_sample
from .load import ACTIVATIONS
from .measuring import figures, sample
from .run import Finetuned, Run

_INT8 = """
### Int8 activations

The 4-bit layers of the base rounded their inputs and gradients to int8 during training (`--activations int8`). The
adapter itself got the exact ones. `qlora-ext generate`, `chat` and `serve` compute in the same way unless
`--activations exact` is given.
"""


def save(run: Run) -> Finetuned:
    """Saves the adapter and the metrics of a trained run."""
    end = run.trainer.measure()
    steps = [line for line in run.trainer.state.log_history if "loss" in line or is_measured(line)]
    history = [run.before, *(line for line in steps if "loss" in line or line["step"] < end["step"]), end]
    write_json_lines(run.metrics, history)
    metrics = {"steps": end["step"]}
    for when, measured in (("before", run.before), ("after", end)):
        metrics |= {f"{key}_{when}": value for key, value in figures(measured).items()}
    _save_adapter(run, metrics)
    curve = run.directory / "loss.png"
    plot_loss(history, curve, f"{pathlib.Path(run.settings.model).name} on {pathlib.Path(run.settings.data).name}")
    run.report(f"held-out {describe(run.before)} before -> {describe(end)} after training")
    show_sample(run.console, "after training", *sample(run))
    run.report(f"adapter {run.adapter}\nmetrics {run.metrics}\ncurve   {curve}")
    # Not wrapped, so that the commands can be copied.
    run.console.print(f"try it: {_try_it(run, 'generate', '--prompt', 'Hello')}", soft_wrap=True)
    run.console.print(f"   or:  {_try_it(run, 'chat')}", soft_wrap=True)
    return Finetuned(run.directory, run.adapter, metrics)


def _save_adapter(run: Run, metrics: dict[str, Any]) -> None:
    activations = run.digests[ACTIVATIONS]  # what auto is on this processor
    record = {
        "model": run.source.name,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "version": VERSION,
        "settings": {**dataclasses.asdict(run.settings), ACTIVATIONS: activations},
        "metrics": metrics,
    }
    with staged_directory(run.adapter, foreign_in_adapter) as partial:
        run.model.save_pretrained(str(partial))
        notes = [_INT8] if activations != EXACT else []
        if run.settings.teacher:
            notes.append(_distilled(run))
        with (partial / "README.md").open("a", encoding="utf-8") as card:
            card.writelines(notes)
        files = sorted(p.relative_to(partial).as_posix() for p in partial.rglob("*") if not p.is_dir())
        write_json(partial / RECORD, {**record, "files": files})


def _distilled(run: Run) -> str:
    """The part of the model card that names the teacher."""
    s = run.settings
    samples = (
        f" {s.student_samples:.0%} of the steps learnt from the student's own answers." if s.student_samples else ""
    )
    top = f", on its {s.teacher_top_k} most likely tokens" if s.teacher_cache else ""
    return f"""
### Distillation

The adapter was trained to minimize the {s.divergence} KL divergence from the teacher `{printable(s.teacher)}`{top}
(`--method distill`).{samples}
"""


def _try_it(run: Run, command: str, *options: str) -> str:
    """A shell command that uses the adapter."""
    if run.source.trust_remote_code:
        options = (*options, "--model", run.source.name, "--trust-remote-code")
    return printable(shlex.join(["qlora-ext", command, "--adapter", str(run.adapter), *options]))
