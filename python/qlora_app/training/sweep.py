"""``finetune --sweep``: trains several adapters in one process, one after the other over one base in memory.

A sweep is a directory of runs. Each has its own checkpoints, metrics and adapter, and the bits of a run by itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qlora_ext.untrusted import FileError, Schema, check, parse_json, printable, read_json, read_text

from ..errors import UserError, path_named
from ..models.adapter_files import find, record_of
from ..options import flag
from ..outputs.directory import Output, claim, mark
from ..outputs.files import need_space, write_json
from ..outputs.lock import locked
from ..outputs.ownership import RECORD, SWEEP
from .identity import digest_of_model, digest_of_rows
from .phases import finetune_once
from .run import SETTINGS, Finetuned, Request, Run, Shared
from .settings import BASE_FORMAT, Settings, given, named_modules, read_settings, resumed
from .sweep_options import Values, as_text, checked, combinations

if TYPE_CHECKING:
    from .load import Base

_SCHEMA: Schema = {"sweep": dict, "adapters": [{"name": str, "held_out": str, "diverged?": str}]}
_METRICS: Schema = {"steps": int, "loss_before": float, "loss_after": float}
# Options whose recorded values may differ from those of the sweep: a path is recorded as absolute, and a run of the
# sweep may have been made longer by itself.
_MAY_DIFFER = ("data", "max_steps", "epochs")


@dataclasses.dataclass(frozen=True)
class Swept:
    """A finished sweep.

    Attributes:
        directory: of the sweep, with ``sweep.json`` and ``loss.png``.
        runs: the run of each adapter, by the name of its directory, such as ``lr=0.0001,rank=8``.
        best: the name of the adapter with the lowest loss on the held-out rows; None if these rows differ.
    """

    directory: pathlib.Path
    runs: dict[str, Finetuned]
    best: str | None


def is_sweep(directory: pathlib.Path) -> bool:
    """Whether ``directory`` has a sweep."""
    return (directory / SWEEP).is_file()


def run(request: Request) -> Finetuned | Swept:
    """Trains what ``request`` asks for: one adapter, or those of a sweep."""
    resumes_sweep = request.resume and is_sweep(path_named(request.output, "--output"))
    return finetune_once(request) if request.sweep is None and not resumes_sweep else sweep(request)


def sweep(request: Request) -> Swept:
    """Trains the adapters of a new sweep, or the unfinished ones of a resumed sweep.

    Raises:
        UserError: the request is invalid, or an adapter diverged. The others are trained nevertheless.
    """
    with claim(request.output, request.overwrite) as output, contextlib.ExitStack() as locks:
        found = _found(request, output)
        if found.begun:
            _check_unchanged(request, found)
        unfinished = [name for name in found.options if name not in found.finished()]
        if found.begun:
            for name in unfinished:
                locks.enter_context(locked(found.directory / name))
        runs = _prepared(request, output, found, unfinished)
        if runs:
            _train(output, found, runs, locks)
        return _conclude(found)


class _Sweep:
    """A sweep in ``directory``.

    Attributes:
        begun: whether the directory has been written.
        values: of ``--sweep``.
        options: those that vary, of each adapter.
        held_out: the digest of the held-out rows of each adapter.
        diverged: the error of each adapter whose loss was not finite.
    """

    def __init__(self, directory: pathlib.Path, values: Values, adapters: list[dict[str, Any]] | None = None) -> None:
        self.directory, self.values, self.begun = directory, values, adapters is not None
        self.options = combinations(values)
        self.held_out = {adapter["name"]: adapter["held_out"] for adapter in adapters or ()}
        self.diverged = {a["name"]: a["diverged"] for a in adapters or () if a.get("diverged") is not None}

    def finished(self) -> dict[str, Finetuned]:
        """The finished runs, by name."""
        runs = {}
        for name in self.options if self.begun else ():
            run = self.directory / name
            path = run / "adapter" / RECORD
            if path.is_file():
                metrics: Any = record_of(path.parent).get("metrics")
                check(metrics, _METRICS, printable(path), "metrics")
                runs[name] = Finetuned(run, path.parent, metrics)
        return runs

    def best(self) -> str | None:
        """The name of the finished adapter with the lowest held-out loss; None if the held-out rows differ."""
        losses = {name: run.metrics["loss_after"] for name, run in self.finished().items()}
        if not losses or len(set(self.held_out.values())) > 1:
            return None
        return min(losses, key=losses.__getitem__)

    def write(self, directory: pathlib.Path | None = None) -> None:
        """Writes ``sweep.json``, to ``directory`` if it is given."""
        finished = self.finished()
        adapters = [
            {
                "name": name,
                "options": options,
                "held_out": self.held_out[name],
                "metrics": finished[name].metrics if name in finished else None,
                "diverged": self.diverged.get(name),
            }
            for name, options in self.options.items()
        ]
        content = {"sweep": self.values, "best": self.best(), "adapters": adapters}
        write_json((directory or self.directory) / SWEEP, content)


def _found(request: Request, output: Output) -> _Sweep:
    """The sweep to resume, or a new one whose options are valid."""
    path = output.path
    if (path / SETTINGS).is_file() and not request.overwrite:
        raise UserError(f"--sweep: --output {path} is a run of one adapter; name another directory")
    if is_sweep(path) and not (request.resume or request.overwrite):
        raise UserError(
            f"--output {path} already has a sweep; add --resume to continue it, or --overwrite to start over"
        )
    if request.resume and not is_sweep(path):
        request.begin_anew()
    asked = None if request.sweep is None else checked(request.sweep)
    if is_sweep(path) and request.resume:
        return _recorded(path, asked)
    assert asked is not None
    new = _Sweep(path, asked)
    for name, values in new.options.items():
        _check_options(request, values)
        with _about(name):
            Settings(**given({**request.options, **values}))
    output.check()
    return new


def _recorded(path: pathlib.Path, asked: Values | None) -> _Sweep:
    """The sweep in ``path``, whose values must be those that are ``asked`` for."""
    record = read_json(path / SWEEP, _SCHEMA)
    try:
        found = _Sweep(path, checked(record["sweep"]), record["adapters"])
    except UserError as error:
        raise FileError(f"{printable(path / SWEEP)} is damaged: {error}") from error
    if list(found.held_out) != list(found.options):
        raise FileError(f"{printable(path / SWEEP)} is damaged: its adapters are not those of its values")
    if asked is not None and asked != found.values:
        raise UserError(
            f"--sweep {as_text(asked)!r}: the sweep in {path} was started with {as_text(found.values)!r}; leave the "
            "option out, or start over in another --output"
        )
    return found


@contextlib.contextmanager
def _about(name: str) -> Iterator[None]:
    """Names the adapter in errors."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"--sweep {name}: {error}") from error


def _check_options(request: Request, values: dict[str, Any]) -> None:
    """Rejects options that contradict a sweep."""
    options = request.options
    for name in options:
        if name in values:
            raise UserError(f"{flag(name)}: --sweep varies it; give its values in one place")
    if options.get("method") == "grpo" or request.rewards:
        raise UserError("--sweep and --method grpo exclude each other; give each adapter a run of its own")
    if options.get("merge_aware") not in (None, "", BASE_FORMAT, True, False):
        raise UserError(
            f"--sweep and --merge-aware {options['merge_aware']} exclude each other, because that format replaces the "
            "weights of the base"
        )
    if options.get("max_memory"):
        raise UserError(
            "--sweep and --max-memory exclude each other, because it chooses the options of one run; qlora-ext plan "
            "--max-memory names them"
        )
    trackers = set(named_modules(options.get("report_to") or "none")) - {"none", "tensorboard"}
    if trackers:
        raise UserError(
            f"--report-to {min(trackers)}: a sweep reports to tensorboard only, which has files for each adapter"
        )
    if options.get("init_adapter"):
        from qlora_ext.integrations.peft.base_file import recorded_base_format

        if recorded_base_format(find(str(options["init_adapter"]), "--init-adapter")) is not None:
            raise UserError("--sweep: the adapter of --init-adapter was trained with --merge-aware, in another format")


def _check_unchanged(request: Request, found: _Sweep) -> None:
    """Rejects resuming a sweep with other options, or one whose runs were replaced."""
    typed = given(request.options, resume=True)
    for name, values in found.options.items():
        run = found.directory / name
        _check_options(request, values)
        if not (run / SETTINGS).is_file():
            raise UserError(f"--resume: {run}, a run of the sweep, is missing; start over with --overwrite")
        recorded = read_settings(run / SETTINGS)
        former, now = resumed(recorded, {}), resumed(recorded, typed)
        if getattr(now, former.longer) != getattr(former, former.longer):
            raise UserError(
                f"{flag(former.longer)} {getattr(now, former.longer)}: a sweep cannot be made longer, only one of its "
                f"runs, with --output {run}"
            )
        for option, value in values.items():
            if option not in _MAY_DIFFER and getattr(former, option) != value:
                raise UserError(f"--resume: {run} was started with {flag(option)} {getattr(former, option)}")


def _prepared(request: Request, output: Output, found: _Sweep, names: list[str]) -> dict[str, Run]:
    """The runs of the adapters with these names. Their inputs are checked, and their rows encoded."""
    from .prepare import prepare

    shared, runs = Shared(), {}
    if names:
        print(f"{len(names)} adapters, one after the other over one base")
    for name in names:
        print(name, flush=True)
        path = found.directory / name
        options = {**request.options, **({} if found.begun else found.options[name])}
        own = dataclasses.replace(request, options=options, output=str(path), sweep=None)
        if not found.begun:
            own = dataclasses.replace(own, resume=False, force=False)
        with _about(name):
            run = prepare(own, Output(path, request.overwrite), shared)
        run.sweep = found.directory
        output.inputs += run.output.inputs
        runs[name] = run
    if not found.begun:
        output.check()  # again, because the inputs are known now
    return runs


def _train(output: Output, found: _Sweep, runs: dict[str, Run], locks: contextlib.ExitStack) -> None:
    """Loads the base, and trains the adapters of ``runs`` in turn."""
    from .load import identify, load_base
    from .restoring import restored
    from .teacher import load_teacher

    for run in runs.values():
        load_teacher(run)
    base = load_base(next(iter(runs.values())), output)
    for run in runs.values():
        identify(run, base)
    sizes = [_tried(name, run, base) for name, run in runs.items()]
    if not found.begun:
        _begin(output, found, runs)
        for run in runs.values():
            locks.enter_context(locked(run.directory))
    # At the end, each run has its adapter and two checkpoints; each of these has the adapter and two moments.
    need_space(found.directory, 7 * sum(sizes) + 3 * max(sizes) + (4 << 20), "the checkpoints of the sweep's runs")
    for number, (name, run) in enumerate(runs.items(), start=1):
        print(f"\n{number}/{len(runs)}  {name}", flush=True)
        with restored(base.model):
            _train_one(found, name, run, base)
        found.write()
        if digest_of_model(base.model) != base.digest:
            raise RuntimeError(f"the adapter {name} has changed its base; train it in a run of its own")


def _tried(name: str, run: Run, base: Base) -> int:
    """Adds the adapter of ``run`` to the base and takes it off, to find errors before others are trained.

    Returns:
        The bytes of what it trains.
    """
    from .load import adapt
    from .restoring import restored

    run.console.quiet = True
    with restored(base.model), _about(name):
        adapt(run, base)
        size: int = sum(p.nbytes for p in run.model.parameters() if p.requires_grad)
        run.model = None
    run.console.quiet = False
    return size


def _begin(output: Output, found: _Sweep, runs: dict[str, Run]) -> None:
    """Creates the directory of a new sweep, with all its runs, so that resuming one never depends on other options."""
    from .train import write_settings

    found.held_out = {name: digest_of_rows(run.parts.held_out) for name, run in runs.items()}
    with output.written("sweep", runs=list(runs)) as partial:
        found.write(partial)
        for name, run in runs.items():
            (partial / name).mkdir()
            write_settings(run, partial / name)
            mark(partial / name, "finetune", run.digests)
    found.begun = True


def _train_one(found: _Sweep, name: str, run: Run, base: Base) -> None:
    """Trains and saves one adapter."""
    from .load import adapt
    from .save import save
    from .train import train
    from .trainer import Diverged

    found.diverged.pop(name, None)
    try:
        adapt(run, base)
        train(run)
        save(run)
    except Diverged as error:
        found.diverged[name] = str(error)
        run.report(f"this adapter diverged: {error}")
    finally:
        run.model = run.trainer = run.arguments = None


def _conclude(found: _Sweep) -> Swept:
    """Writes and prints the results of a sweep.

    Raises:
        UserError: an adapter diverged.
    """
    from ..terminal.progress import describe, plot_losses
    from ..terminal.tables import aligned

    runs, best = found.finished(), found.best()
    rows = [["adapter", "steps", "held out, before", "after", ""]]
    for name, run in runs.items():
        measured = [
            describe({f"eval_{key.removesuffix(when)}": value for key, value in run.metrics.items() if when in key})
            for when in ("_before", "_after")
        ]
        rows.append([name, str(run.metrics["steps"]), *measured, "best" if name == best else ""])
    rows += [[name, "", "", "diverged", ""] for name in found.diverged]
    print()
    for line in aligned(rows):
        print(line)
    if best is None:
        print("the held-out rows differ between these adapters, so their losses do not compare")
    curve = found.directory / "loss.png"
    plot_losses({name: _history(run.directory) for name, run in runs.items()}, curve)
    print(f"results {found.directory / SWEEP}\ncurves  {curve}", flush=True)
    if found.diverged:
        reasons = "; ".join(f"{name}: {error}" for name, error in found.diverged.items())
        raise UserError(f"--sweep: {len(found.diverged)} of {len(found.options)} adapters diverged ({reasons})")
    return Swept(found.directory, runs, best)


def _history(run: pathlib.Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [parse_json(line, printable(path), {"step": int}) for line in read_text(path).splitlines()]
