"""The report after an export: the loss of the trained and of the exported model, and the errors of the weights."""

from __future__ import annotations

import dataclasses
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
from ..models.sources import resolve
from ..training.evaluation import rows_of_run, token_losses
from .job import Factors, Job
from .targets import CHECKS, ExportRequest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .weight_errors import WeightError

_BATCH = 4  # rows
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
        losses: of the trained and of the exported model, in nats, for each token that was predicted; None if they were
            not measured.
        errors: of the weights, or for an adapter alone, of its updates.
        of_updates: whether they are of updates.
    """

    text: str
    losses: tuple[Tensor, Tensor] | None
    errors: list[WeightError]
    of_updates: bool

    @property
    def increase(self) -> tuple[float, float]:
        """The mean increase of the loss, in nats per token, and its standard error. Both are NaN if a loss is."""
        if self.losses is None:
            return 0.0, 0.0
        trained, exported = self.losses
        increases = exported - trained
        return increases.mean().item(), increases.std(correction=0).item() / math.sqrt(len(increases))


def check_options(arguments: ExportRequest) -> None:
    """Checks the options of a check against each other.

    Raises:
        UserError: one of them has no effect, or is out of range.
    """
    limit = arguments.max_loss_increase
    if limit is not None and not 0 <= limit < math.inf:
        raise UserError(f"--max-loss-increase {limit}: expected 0 or more, in nats per token")
    for name in ("data", "max_loss_increase"):
        if arguments.check == "none" and getattr(arguments, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} needs a check: --check short or full")


class Check:
    """A check of an export that has not begun. Its data are read.

    Args:
        arguments: of the command.
        job: the export.
    """

    def __init__(self, arguments: ExportRequest, job: Job) -> None:
        self._tokens, self._job = CHECKS[arguments.check], job
        self._model: Any = None
        self._adapted = None if _without_weights(arguments, job) else find_adapted(arguments)
        self._text = _Text("", []) if self._adapted is None else _text(arguments, self._adapted, self._tokens)

    def begin(self) -> None:
        """Loads the base of an adapter that is written alone, which rejects another base.

        For other targets, the export loads it before it writes.
        """
        if self._job.read_adapter is not None and self._adapted is not None:
            self._model = self._adapted.load()

    def report(self, path: pathlib.Path) -> Report:
        """Compares the exported model at ``path`` with the trained one."""
        try:
            return self._report(path)
        except UserError as error:
            raise UserError(f"{printable(path)} was written, but cannot be checked: {error}") from error

    def _report(self, path: pathlib.Path) -> Report:
        from .weight_errors import update_errors, weight_errors, weights_in, weights_of

        factors = {} if self._job.read_adapter is None else self._job.read_adapter(path)
        if self._adapted is None:
            return Report("", None, [*update_errors(factors)], True)
        trained = self._trained() if self._model is None else self._model
        text = self._complete(trained)
        before = self._losses(trained, text)
        if self._job.read_adapter is not None:
            _put(factors, trained)
            return Report(text.name, (before, self._losses(trained, text)), [*update_errors(factors)], True)
        exported = self._exported(path)
        after = self._losses(exported, text)
        errors = weight_errors(weights_of(trained), weights_in(resolve(str(path)), exported))
        return Report(text.name, (before, after), [*errors], False)

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype in which both models compute. On a GPU, a dense model in float32 may be too large."""
        import torch

        from qlora_ext.dtypes import computing_dtype

        assert self._adapted is not None
        loader = self._adapted.loader
        return torch.float32 if loader.device.type == "cpu" else computing_dtype(loader.dtype, loader.device)

    def _trained(self) -> Any:
        assert self._adapted is not None
        loader, source = self._adapted.loader, self._adapted.source
        if self._adapted.adapter is not None or is_4bit(source) or has_4bit_blocks(source):
            return self._adapted.load()
        return load_dense(source, self._dtype, loader.device)

    def _exported(self, path: pathlib.Path) -> Any:
        """The model at ``path``. Weights that are not 4-bit there stay dense."""
        from qlora_ext.form import Form

        assert self._adapted is not None
        source, device = resolve(str(path)), self._adapted.loader.device
        if is_4bit(source) or has_4bit_blocks(source):
            return Loader(source, Form(), self._dtype, device).while_loading()
        return load_dense(source, self._dtype, device)

    def _complete(self, model: Any) -> _Text:
        """The text, with what the model is to write."""
        from qlora_ext.calibration import self_text

        text, limit = self._text, validate_model.longest_input(model) or held_out.LENGTH
        length = min(held_out.LENGTH, limit)
        if text.rows and text.written < length:
            return text
        ids = self_text.write(model, max(1, text.written // length), length, 0)
        name = f"{text.name} and {_WRITTEN}" if text.rows else _WRITTEN
        return dataclasses.replace(text, name=name, rows=[*text.rows, *_rows_of(ids.tolist())])

    def _losses(self, model: Any, text: _Text) -> Tensor:
        return token_losses(model, text.rows, text.size, self._dtype)


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
        longest = validate_model.longest_input(model) or held_out.LENGTH
        text = _Text(arguments.data, _rows_of(held_out.blocks(arguments.data, adapted.tokenizer, tokens, longest)))
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
    end = total = 0
    for row in rows:
        total += len(row["input_ids"])
        if total > tokens and end:
            break
        end += 1
    return rows[:end]


def _beginning(rows: Iterable[Row], tokens: int) -> Iterator[Row]:
    """The first ``tokens`` tokens of rows."""
    for row in rows:
        if tokens < 2:
            return
        yield {key: values[:tokens] for key, values in row.items()}
        tokens -= len(row["input_ids"])


def _rows_of(blocks: Any) -> list[Row]:
    """Rows of sequences all tokens of which count."""
    return [{"input_ids": ids, "labels": ids} for ids in (list(map(int, block)) for block in blocks)]


def _put(factors: Mapping[str, tuple[Factors, Factors]], model: Any) -> None:
    """Replaces the adapter of a model by the one that was exported."""
    import torch
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    from qlora_ext.integrations.peft.experts import expert_factors

    from .weight_errors import name_in_model

    with torch.no_grad():
        for name, layer in model.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            path, (adapter,) = name_in_model(name), layer.active_adapters
            if isinstance(layer, ParamWrapper) and layer.parameter_name != "weight":  # on experts, not their router
                path = f"{path}.{layer.parameter_name}"
                lora_a, lora_b = expert_factors(layer, adapter)
            else:
                lora_a, lora_b = (module[adapter].weight for module in (layer.lora_A, layer.lora_B))
            _, (a, b, scaling) = factors[path]
            lora_a.copy_(a)
            lora_b.copy_(scaling * b)
            layer.scaling[adapter] = 1.0


_SHOWN = 5


def show(found: Report) -> None:
    """Prints a report."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    if found.losses is not None:
        increase, error = found.increase
        trained, exported = (losses.mean().item() for losses in found.losses)
        line = (
            f"loss on {len(found.losses[0]):,} tokens of {found.text}: {trained:.4f} trained, {exported:.4f} exported "
            f"({increase:+.4f}), standard error {error:.4f}"
        )
        console.print(printable(line), markup=False)
    if not found.errors:
        return
    error, size = (math.hypot(*(getattr(e, name) for e in found.errors)) for name in ("error", "size"))
    what = "update" if found.of_updates else "weights"
    line = f"relative error of the {what}: {error / size if size else 0.0:.3g} in all {len(found.errors)} layers"
    update = sum(e.update for e in found.errors)
    if update:
        line += f", which hold {sum(e.retained for e in found.errors) / update:.1%} of the adapter's update"
    console.print(line, markup=False)
    worst = sorted(found.errors, key=lambda e: -e.relative if e.relative == e.relative else -math.inf)[:_SHOWN]
    if worst[0].relative:
        console.print(_table(worst, len(found.errors)))


def _table(worst: list[WeightError], count: int) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=f"the {len(worst)} of {count} layers with the largest errors", box=box.SIMPLE)
    table.add_column("layer", overflow="fold")
    for name in ("error", "update held"):
        table.add_column(name, justify="right", no_wrap=True)
    for e in worst:
        held = f"{e.retained / e.update:.1%}" if e.update else ""
        table.add_row(printable(e.name), f"{e.relative:.3g}", held)
    return table


def require(found: Report, path: pathlib.Path, limit: float) -> None:
    """Rejects an export whose loss certainly exceeds that of the trained model by more than ``limit``.

    Raises:
        CheckError: it does, or is NaN, or a weight is not that of the trained model.
    """
    _require_weights(found, path)
    increase, error = found.increase
    if increase - _ERRORS * error <= limit:
        return
    if math.isnan(increase):
        raise CheckError(f"the loss of {printable(path)} is NaN; do not serve it")
    raise CheckError(
        f"the loss of {printable(path)} is {increase:.4f} nats per token above that of the trained model, with a "
        f"standard error of {error:.4f}: more than --max-loss-increase {limit:g}; do not serve it"
    )


def _require_weights(found: Report, path: pathlib.Path) -> None:
    """Rejects a model with another weight, or without the adapter, which may change the loss by less than the limit."""
    errors = () if found.of_updates else found.errors
    retained, update = sum(e.retained for e in errors), sum(e.update for e in errors)
    if retained + _ERRORS * math.hypot(*(e.noise for e in errors)) < _LOST * update:
        raise CheckError(f"{printable(path)} holds {retained / update:.1%} of the adapter's update; do not serve it")
    for e in errors:
        if not e.relative < _OTHER_WEIGHT:
            raise CheckError(
                f"{printable(e.name)} of {printable(path)} is not the trained weight: its relative error is "
                f"{e.relative:.3g}; do not serve it"
            )
