"""The report after an export: the loss of the trained and of the exported model, and the errors of the weights."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qlora_ext.untrusted import printable

from ..data import Parts, Row, held_out
from ..errors import UserError
from ..models import validate_model
from ..models.adapted import Adapted, find_adapted
from ..models.adapter_files import base_of, find
from ..models.loading import Loader, load_dense
from ..models.pretrained import has_4bit_blocks, is_4bit, load_config
from ..models.sources import ModelSource, resolve
from ..terminal.tables import print_table
from ..training.evaluation import rows_of_run
from .job import Factors, Job
from .merging import load
from .targets import CHECKS, TARGETS, ExportRequest

if TYPE_CHECKING:
    import torch

    from qlora_ext.fidelity import Comparison

    from .weight_errors import WeightError

_BATCH = 4  # rows
_SHOWN = 5  # layers
_WRITTEN_TOKENS = 8192  # that a model writes at most, because that takes longer than reading them
_WRITTEN = "a text that the model wrote"
_ERRORS = 2  # standard errors by which an increase must exceed the limit, so that chance alone rejects few exports
_OTHER_WEIGHT = 0.5  # relative error from which a weight is another one; no target rounds so coarsely
_LOST = 0.1  # share of the adapter's update below which it is missing; no target rounds so much of it away


class CheckError(RuntimeError):
    """The exported model is worse than the limit allows. It has been written."""


@dataclasses.dataclass(frozen=True)
class _Text:
    """The rows on which both models are compared.

    Attributes:
        name: of the data, for the report.
        rows: of the data.
        size: rows per batch.
        written: the number of tokens that the model is to write as well.
    """

    name: str
    rows: list[Row]
    size: int = _BATCH
    written: int = 0


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a check.

    Attributes:
        text: its name.
        found: the exported model compared with the trained one; None if the losses were not measured.
        errors: of the weights, or for an adapter alone, of its updates.
        of_updates: whether they are of updates.
    """

    text: str
    found: Comparison | None
    errors: list[WeightError]
    of_updates: bool


def check_of(request: ExportRequest) -> type[Check] | None:
    """The check that the options describe, or None.

    Raises:
        UserError: one of them has no effect, or is out of range.
    """
    limit = request.max_loss_increase
    if limit is not None and not 0 <= limit < math.inf:
        raise UserError(f"--max-loss-increase {limit}: expected 0 or more, in nats per token")
    if request.check != "none":
        return Check
    for name in ("data", "max_loss_increase"):
        if getattr(request, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} needs a check: --check short or full")
    return None


class Check:
    """A check of an export that has not begun. Its data are read.

    The base of an adapter that is written alone is loaded too, which rejects another base. For other targets, the
    export loads it before it writes.

    Args:
        request: what is exported.
        job: the export.
    """

    def __init__(self, request: ExportRequest, job: Job) -> None:
        limit = request.max_loss_increase
        self._limit = TARGETS[request.to].max_loss_increase if limit is None else limit
        self._read_adapter = job.read_adapter
        self._adapted = None if _without_weights(request, job) else find_adapted(request)
        self._model: Any = None
        if self._adapted is not None:
            self._text = _text(request, self._adapted, CHECKS[request.check])
            if job.read_adapter is not None:
                self._model = self._adapted.load()

    def report(self, path: pathlib.Path) -> None:
        """Compares the exported model at ``path`` with the trained one, and prints the result.

        Raises:
            UserError: it cannot be checked. CheckError: it is worse than the limit allows.
        """
        with _written(path):
            report = self._report(path)
        show(report)
        require(report, path, self._limit)

    def _report(self, path: pathlib.Path) -> Report:
        from .weight_errors import exported_matrices, matrices_of, update_errors, weight_errors

        factors = None if self._read_adapter is None else self._read_adapter(path)
        if self._adapted is None:
            return Report("", None, [*update_errors(factors or {})], True)
        loader, dtype = self._adapted.loader, _dtype(self._adapted.loader)
        trained = load(self._adapted, dtype) if self._model is None else self._model
        text = _complete(self._text, trained)
        found = _Losses(trained, text, dtype)
        if factors is not None:
            _put(factors, trained)
            return Report(text.name, found.compare(trained), [*update_errors(factors)], True)
        source = resolve(str(path))
        exported = _load(source, dtype, loader.device)
        errors = weight_errors(matrices_of(trained), exported_matrices(source, exported))
        return Report(text.name, found.compare(exported), [*errors], False)


class HeldOutCheck(Check):
    """``merge --evaluate``: the losses on the examples that the run has held out, in the dtype of its computation."""

    def __init__(self, request: ExportRequest, job: Job) -> None:
        self._adapted = adapted = find_adapted(request)
        assert adapted.adapter is not None
        parts, size, name = rows_of_run(adapted.adapter, adapted.tokenizer, "--evaluate")
        self._text = _Text(name, parts.held_out, size)

    def report(self, path: pathlib.Path) -> None:
        from qlora_ext.dtypes import computing_dtype

        assert self._adapted is not None
        loader = self._adapted.loader
        dtype = computing_dtype(loader.dtype, loader.device)
        with _written(path):
            losses = _Losses(self._adapted.load(), self._text, dtype)
            found = losses.compare(_load(resolve(str(path)), dtype, loader.device))
        rise = round(found.loss - found.base_loss, 4) + 0.0
        print(f"held-out loss: {found.base_loss:.4f} unmerged, {found.loss:.4f} merged ({rise:+.4f})")


class _Losses:
    """The losses of the trained model on a text."""

    def __init__(self, trained: Any, text: _Text, dtype: torch.dtype) -> None:
        from qlora_ext.fidelity import losses_of

        from ..training.trainer import batches

        self._rows, self._dtype = [*batches(text.rows, text.size, trained.device)], dtype
        self._trained = losses_of(trained, self._rows, dtype)

    def compare(self, exported: Any) -> Comparison:
        from qlora_ext.fidelity import compare

        return compare(exported, self._trained, self._rows, self._dtype)


@contextlib.contextmanager
def _written(path: pathlib.Path) -> Iterator[None]:
    """Says in errors of a check that the result was written."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{printable(path)} was written, but cannot be checked: {error}") from error


def _dtype(loader: Loader) -> torch.dtype:
    """The dtype in which both models compute. On a GPU, a dense model in float32 may be too large."""
    import torch

    from qlora_ext.dtypes import computing_dtype

    return torch.float32 if loader.device.type == "cpu" else computing_dtype(loader.dtype, loader.device)


def _load(source: ModelSource, dtype: torch.dtype, device: torch.device) -> Any:
    """The exported model. Weights that are not 4-bit there stay dense."""
    from qlora_ext.form import Form

    if is_4bit(source) or has_4bit_blocks(source):
        return Loader(source, Form(), dtype, device).while_loading()
    return load_dense(source, dtype, device)


def _complete(text: _Text, model: Any) -> _Text:
    """The text, with what the model is to write."""
    if text.rows and text.written < held_out.length_for(model):
        return text
    name = f"{text.name} and {_WRITTEN}" if text.rows else _WRITTEN
    written = _rows_of(held_out.written(model, text.written, 0).tolist())
    return dataclasses.replace(text, name=name, rows=[*text.rows, *written])


def _without_weights(arguments: ExportRequest, job: Job) -> bool:
    """Whether the base of an adapter that is written alone has no weights on this machine, which the target permits."""
    if job.read_adapter is None or arguments.adapter is None:
        return False
    source = base_of(find(arguments.adapter), arguments.model, arguments.trust_remote_code)
    if source.directory is None or any(source.directory.glob("*.safetensors")) or any(source.directory.glob("*.bin")):
        return False
    print(f"the losses are not measured, because {printable(source.name)} has no weights", flush=True)
    return True


def _text(arguments: ExportRequest, adapted: Adapted, tokens: int) -> _Text:
    """The text that ``--data`` names; by default the examples of the run, first those that it has held out.

    Raises:
        UserError: the data do not exist, or do not fit the model.
    """
    written = _Text("", [], written=min(tokens, _WRITTEN_TOKENS))
    if arguments.data == "self":
        return written
    model = validate_model.skeleton(adapted.source, load_config(adapted.source))
    if arguments.data is not None:
        blocks = held_out.blocks(arguments.data, adapted.tokenizer, tokens, held_out.length_for(model))
        text = _Text(arguments.data, _rows_of(blocks.tolist()))
    elif adapted.adapter is None or not (adapted.adapter.parent / "settings.json").is_file():
        return written
    else:
        try:
            parts, size, name = rows_of_run(adapted.adapter, adapted.tokenizer, "--check")
        except UserError as error:
            print(f"{printable(error)}; the model writes the text instead", flush=True)
            return written
        text = _of_run(parts, size, name, tokens)
    validate_model.check_tokens(model, [row["input_ids"] for row in text.rows])
    return text


def _of_run(parts: Parts, size: int, name: str, tokens: int) -> _Text:
    """The rows that a run has held out, with at most ``tokens`` tokens if they are several.

    If they have too few tokens for the mean of their losses to be precise, rows follow that the run was trained on, and
    then what the model writes.
    """
    rows = _first(parts.held_out, tokens)
    missing = CHECKS["short"] - _tokens_in(rows)
    if missing <= 0:
        return _Text(f"{name} (held out by the run)", rows, size)
    learnt = sum(label != -100 for row in rows for label in row["labels"][1:])
    trained = [*_beginning(parts.train, missing)]
    name = f"{name} ({learnt:,} of them held out by the run)"
    return _Text(name, [*rows, *trained], size, missing - _tokens_in(trained))


def _tokens_in(rows: list[Row]) -> int:
    return sum(len(row["input_ids"]) for row in rows)


def _first(rows: list[Row], tokens: int) -> list[Row]:
    """The first rows, with at least one and at most ``tokens`` tokens."""
    totals = itertools.accumulate(len(row["input_ids"]) for row in rows)
    return rows[: max(1, sum(total <= tokens for total in totals))]


def _beginning(rows: Iterable[Row], tokens: int) -> Iterator[Row]:
    """The first ``tokens`` tokens of rows."""
    for row in rows:
        if tokens < 2:
            return
        yield {key: values[:tokens] for key, values in row.items()}
        tokens -= len(row["input_ids"])


def _rows_of(blocks: list[list[int]]) -> list[Row]:
    """Rows of sequences all tokens of which count."""
    return [{"input_ids": ids, "labels": ids} for ids in blocks]


def _put(factors: Mapping[str, tuple[Factors, Factors]], model: Any) -> None:
    """Replaces the adapter of a model by the one that was exported."""
    import torch
    from peft.tuners.lora.layer import LoraLayer

    from qlora_ext.integrations.peft.experts import expert_factors
    from qlora_ext.merging.weights import weights_of

    with torch.no_grad():
        for name, weight in weights_of(model).items():
            layer = weight.owner
            if not isinstance(layer, LoraLayer) or weight.parameter == "bias":
                continue
            (adapter,) = layer.active_adapters
            if weight.parameter == "weight":  # also of the router of experts
                lora_a, lora_b = (module[adapter].weight for module in (layer.lora_A, layer.lora_B))
            else:
                lora_a, lora_b = expert_factors(layer, adapter)
            _, (a, b, scaling) = factors[name.removesuffix(".weight")]
            lora_a.copy_(a)
            lora_b.copy_(scaling * b)
            layer.scaling[adapter] = 1.0


def show(report: Report) -> None:
    """Prints a report."""
    if report.found is not None:
        found, increase = report.found, report.found.increase
        print(
            f"loss on {len(found.losses):,} tokens of {printable(report.text)}: {found.base_loss:.4f} trained, "
            f"{found.loss:.4f} exported ({increase.nats:+.4f}), standard error {increase.error:.4f}"
        )
    errors = report.errors
    if not errors:
        return
    error, size = (math.hypot(*(getattr(e, name) for e in errors)) for name in ("error", "size"))
    what = "update" if report.of_updates else "weights"
    line = f"relative error of the {what}: {error / size if size else 0.0:.3g} in all {len(errors)} layers"
    update = sum(e.update for e in errors)
    if update:
        line += f", which hold {sum(e.retained for e in errors) / update:.1%} of the adapter's update"
    print(line)
    worst = sorted(errors, key=lambda e: -e.relative if e.relative == e.relative else -math.inf)[:_SHOWN]
    if worst[0].relative:
        held = (f"{e.retained / e.update:.1%}" if e.update else "" for e in worst)
        rows = ((printable(e.name), f"{e.relative:.3g}", share) for e, share in zip(worst, held, strict=True))
        title = f"the {len(worst)} of {len(errors)} layers with the largest errors"
        print_table(title, ("layer", "error", "update held"), rows)


def require(report: Report, path: pathlib.Path, limit: float) -> None:
    """Rejects an export whose loss certainly exceeds that of the trained model by more than ``limit``.

    Raises:
        CheckError: it does, or is NaN, or a weight is not that of the trained model.
    """
    _require_weights(report, path)
    if report.found is None:
        return
    increase = report.found.increase
    if increase.nats - _ERRORS * increase.error <= limit:
        return
    if math.isnan(increase.nats):
        raise CheckError(f"the loss of {printable(path)} is NaN; do not serve it")
    raise CheckError(
        f"the loss of {printable(path)} is {increase.nats:.4f} nats per token above that of the trained model, with a "
        f"standard error of {increase.error:.4f}: more than --max-loss-increase {limit:g}; do not serve it"
    )


def _require_weights(report: Report, path: pathlib.Path) -> None:
    """Rejects a model with another weight, or without the adapter, which may change the loss by less than the limit."""
    errors = () if report.of_updates else report.errors
    retained, update = sum(e.retained for e in errors), sum(e.update for e in errors)
    if retained + _ERRORS * math.hypot(*(e.noise for e in errors)) < _LOST * update:
        raise CheckError(f"{printable(path)} holds {retained / update:.1%} of the adapter's update; do not serve it")
    for e in errors:
        if not e.relative < _OTHER_WEIGHT:
            raise CheckError(
                f"{printable(e.name)} of {printable(path)} is not the trained weight: its relative error is "
                f"{e.relative:.3g}; do not serve it"
            )
