"""The report after an export: the loss of the trained and of the exported model, and the errors of the weights."""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..._internal.untrusted import printable
from ..data import Row, held_out
from ..errors import UserError
from ..models import validate_model
from ..models.adapted import Adapted, find_adapted
from ..models.adapter_files import base_of, find
from ..models.loading import Loader, load_dense
from ..models.pretrained import has_4bit_blocks, is_4bit, load_config
from ..models.sources import resolve
from ..training.evaluation import held_out_rows, loss_on
from .job import Factors, Job
from .targets import CHECKS

if TYPE_CHECKING:
    from .weight_errors import WeightError

_BATCH = 4  # rows
_WRITTEN_TOKENS = 8192  # that a model writes at most, because that takes longer than reading them
_WRITTEN = "a text that the model wrote"


class CheckError(RuntimeError):
    """The exported model is worse than the limit allows. It has been written."""


@dataclasses.dataclass(frozen=True)
class _Text:
    """The rows on which both models are compared.

    Attributes:
        name: of the data, for the report.
        rows: empty if the model is to write them.
        size: rows per batch.
    """

    name: str
    rows: list[Row]
    size: int = _BATCH


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a check.

    Attributes:
        text, tokens: the name of the text, and the number of tokens that were predicted.
        trained, exported: the losses in nats per token; None if they were not measured.
        errors: of the weights, or for an adapter alone, of its updates.
        of_updates: whether they are of updates.
    """

    text: str
    tokens: int
    trained: float | None
    exported: float | None
    errors: list[WeightError]
    of_updates: bool

    @property
    def increase(self) -> float:
        """Of the loss, in nats per token; NaN if the exported model's is."""
        return 0.0 if self.trained is None or self.exported is None else self.exported - self.trained


def check_options(arguments: argparse.Namespace) -> None:
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

    def __init__(self, arguments: argparse.Namespace, job: Job) -> None:
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
            return Report("", 0, None, None, [*update_errors(factors)], True)
        trained = self._trained() if self._model is None else self._model
        text = self._text if self._text.rows else self._written_by(trained)
        before = self._loss(trained, text)
        if self._job.read_adapter is not None:
            _put(factors, trained)
            after, errors = self._loss(trained, text), [*update_errors(factors)]
        else:
            source = resolve(str(path))
            exported = self._exported(path)
            after = self._loss(exported, text)
            errors = [*weight_errors(weights_of(trained), weights_in(source, exported))]
        tokens = sum(label != -100 for row in text.rows for label in row["labels"][1:])
        return Report(text.name, tokens, before, after, errors, self._job.read_adapter is not None)

    def _trained(self) -> Any:
        assert self._adapted is not None
        loader, source = self._adapted.loader, self._adapted.source
        if self._adapted.adapter is not None or is_4bit(source) or has_4bit_blocks(source):
            return self._adapted.load()
        return load_dense(source, loader.dtype, loader.device)

    def _exported(self, path: pathlib.Path) -> Any:
        """The model at ``path``. Weights that are not 4-bit there stay dense."""
        from ...form import Form

        assert self._adapted is not None
        source, loader = resolve(str(path)), self._adapted.loader
        if is_4bit(source) or has_4bit_blocks(source):
            return Loader(source, Form(), loader.dtype, loader.device).while_loading()
        return load_dense(source, loader.dtype, loader.device)

    def _written_by(self, model: Any) -> _Text:
        from ...calibration import self_text

        length = min(held_out.LENGTH, validate_model.longest_input(model) or held_out.LENGTH)
        ids = self_text.write(model, max(1, min(self._tokens, _WRITTEN_TOKENS) // length), length, 0)
        return _Text(_WRITTEN, _rows_of(ids.tolist()))

    def _loss(self, model: Any, text: _Text) -> float:
        from ...dtypes import computing_dtype

        assert self._adapted is not None
        loader = self._adapted.loader
        return loss_on(model, text.rows, text.size, computing_dtype(loader.dtype, loader.device))


def _without_weights(arguments: argparse.Namespace, job: Job) -> bool:
    """Whether the base of an adapter that is written alone has no weights on this machine, which the target permits."""
    if job.read_adapter is None:
        return False
    source = base_of(find(arguments.adapter), arguments.model, arguments.trust_remote_code)
    if source.directory is None or any(source.directory.glob("*.safetensors")) or any(source.directory.glob("*.bin")):
        return False
    print(f"the losses are not measured, because {printable(source.name)} has no weights", flush=True)
    return True


def _text(arguments: argparse.Namespace, adapted: Adapted, tokens: int) -> _Text:
    """The text that ``--data`` names; by default the examples that a run has held out.

    Raises:
        UserError: the data do not exist, or do not fit the model.
    """
    if arguments.data == "self":
        return _Text(_WRITTEN, [])
    model = validate_model.skeleton(adapted.source, load_config(adapted.source))
    if arguments.data is not None:
        longest = validate_model.longest_input(model) or held_out.LENGTH
        text = _Text(arguments.data, _rows_of(held_out.blocks(arguments.data, adapted.tokenizer, tokens, longest)))
    elif adapted.adapter is None or not (adapted.adapter.parent / "settings.json").is_file():
        return _Text(_WRITTEN, [])
    else:
        try:
            rows, size, name = held_out_rows(adapted.adapter, adapted.tokenizer, "--check")
        except UserError as error:
            print(f"{printable(error)}; the model writes the text instead", flush=True)
            return _Text(_WRITTEN, [])
        text = _Text(f"{name} (held out by the run)", _first(rows, tokens), size)
    validate_model.check_tokens(model, [row["input_ids"] for row in text.rows])
    return text


def _first(rows: list[Row], tokens: int) -> list[Row]:
    """The first rows, with at least one and at most ``tokens`` tokens."""
    end = total = 0
    for row in rows:
        total += len(row["input_ids"])
        if total > tokens and end:
            break
        end += 1
    return rows[:end]


def _rows_of(blocks: Any) -> list[Row]:
    """Rows of sequences all tokens of which count."""
    return [{"input_ids": ids, "labels": ids} for ids in (list(map(int, block)) for block in blocks)]


def _put(factors: Mapping[str, tuple[Factors, Factors]], model: Any) -> None:
    """Replaces the adapter of a model by the one that was exported."""
    import torch
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    from ...integrations.peft.experts import expert_factors
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
    if found.trained is not None and found.exported is not None:
        line = (
            f"held-out loss on {found.tokens:,} tokens of {found.text}: {found.trained:.4f} trained, "
            f"{found.exported:.4f} exported ({found.increase:+.4f})"
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
    """Rejects an export whose loss exceeds that of the trained model by more than ``limit``.

    Raises:
        CheckError: it does, or is NaN.
    """
    if found.increase <= limit:
        return
    if math.isnan(found.increase):
        raise CheckError(f"the loss of {printable(path)} is NaN; do not serve it")
    raise CheckError(
        f"the loss of {printable(path)} is {found.increase:.4f} nats per token above that of the trained model, more "
        f"than --max-loss-increase {limit:g}; do not serve it"
    )
