"""The progress of a training run on the terminal, and its metrics file."""

from __future__ import annotations

import contextlib
import math
import pathlib
import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text
from transformers import TrainerCallback

from qlora_ext.untrusted import printable

from ..outputs.files import append_json_line, write_json_lines

_WIDE_COLUMNS = 70  # narrower terminals show only the counts, the loss and the time left
_NAMED_CURVES = 20  # more names would cover the curves
_SHOWN = 300  # only the last characters of a prompt are shown
_LINES = 20  # progress lines per run if the output is not a terminal


class ProgressCallback(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Shows a bar with loss, tokens/s and time left, and writes the logged values to ``metrics.jsonl``.

    The file has one line per step. The first line is ``before``, the measurements before the first step.
    """

    def __init__(self, console: Console, metrics: pathlib.Path, before: dict[str, Any]) -> None:
        self.console = console
        self.metrics = metrics
        self.before = before
        self._seen = 0
        self._since = 0.0
        # Counts and loss come first and are never cut. The bar takes the remaining width.
        columns = [
            TextColumn("{task.completed}/{task.total}", table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[loss]}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.fields[rate]}", table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TextColumn("left", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(elapsed_when_finished=False, table_column=Column(no_wrap=True)),
        ]
        if console.width < _WIDE_COLUMNS:
            del columns[3:6]  # the time left stays
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal, expand=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A resumed run repeats the steps after its checkpoint, so their lines are removed.
        write_json_lines(self.metrics, [self.before, *state.log_history])
        self._begun = self._since = time.monotonic()
        self._first = state.global_step
        self._seen = state.num_input_tokens_seen
        self._bar.start()
        self._task = self._bar.add_task("", total=state.max_steps, completed=self._first, loss="", rate="")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        record = state.log_history[-1]
        if is_measured(record):
            self.console.print(f"step {state.global_step}: held-out {describe(record)}")
        if "loss" in record:
            record["tokens_per_second"] = self._show(state, record)
            if not math.isfinite(record["loss"]):
                raise FloatingPointError(
                    f"the loss is {record['loss']} at step {state.global_step}; try a smaller --lr"
                )
        if "loss" in record or is_measured(record):
            append_json_line(self.metrics, record)

    def _show(self, state: Any, record: dict[str, Any]) -> float:
        name = "reward" if "reward" in record else "loss"
        shown = f"{name} {record[name]:.3f}"
        now = time.monotonic()
        rate: float = (state.num_input_tokens_seen - self._seen) / max(now - self._since, 1e-9)
        self._seen, self._since = state.num_input_tokens_seen, now
        self._bar.update(self._task, completed=state.global_step, loss=shown, rate=f"{rate:.0f} tokens/s")
        step, last = state.global_step, state.max_steps
        if not self.console.is_terminal and (step % max(1, last // _LINES) == 0 or step == last):
            left = (now - self._begun) / (step - self._first) * (last - step)
            self.console.print(
                f"step {step}/{last}  {shown}  {rate:.0f} tokens/s  {left // 60:.0f}:{left % 60:02.0f} left"
            )
        return rate

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        self._bar.stop()


def is_measured(record: dict[str, Any]) -> bool:
    """Whether a line of ``metrics.jsonl`` has measurements on the held-out rows."""
    return "eval_loss" in record or "eval_reward" in record


def describe(measured: dict[str, Any]) -> str:
    """The measurements on the held-out rows (``RunTrainer.measure``), as text."""
    if "eval_perplexity" in measured:
        return f"perplexity {measured['eval_perplexity']:.2f}"
    if "eval_reward" in measured:
        return f"reward {measured['eval_reward']:.4f}"
    if "eval_text_perplexity" in measured:
        return f"divergence {measured['eval_loss']:.4f}, perplexity {measured['eval_text_perplexity']:.2f}"
    loss = f"loss {measured['eval_loss']:.4f}"
    if "eval_reward_accuracy" in measured:
        return f"{loss}, {measured['eval_reward_accuracy']:.0%} of the pairs ranked correctly"
    if "eval_reward_margin" in measured:
        return f"{loss}, rewards of good answers {measured['eval_reward_margin']:+.4f} above those of bad ones"
    return loss


def show_sample(console: Console, title: str, prompt: str, answer: str) -> None:
    """Shows a prompt and a model's completion in a frame."""
    text = Text(printable(prompt.strip()[-_SHOWN:], lines=True), style="dim")
    text.append("\n" + printable(answer.strip(), lines=True), style="not dim")
    console.print(Panel(text, title=title, title_align="left"))


@contextlib.contextmanager
def _plotted(path: pathlib.Path, histories: Iterable[list[dict[str, Any]]], title: str) -> Iterator[Any]:
    """The axes of a plot of losses by step, which is saved as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from ..outputs.files import staged_file

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=150, layout="constrained")
    yield axes
    records = [record for history in histories for record in history]
    if any("eval_reward" in record for record in records):
        label = "reward"
    else:
        units = dict.fromkeys(("eval_perplexity", "eval_text_perplexity"), " (nats per token)")
        units |= {"eval_reward_accuracy": " (nats per pair)"}
        label = "loss" + next((unit for key, unit in units.items() if any(key in record for record in records)), "")
    axes.set(xlabel="step", ylabel=label, title=title)
    axes.grid(alpha=0.3)
    with staged_file(path) as partial:
        figure.savefig(partial, format="png")
    pyplot.close(figure)


def _points(history: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """The steps at which there is a value, and the values."""
    found = [record for record in history if key in record]
    return [record["step"] for record in found], [record[key] for record in found]


def plot_loss(history: list[dict[str, Any]], path: pathlib.Path, title: str) -> None:
    """Plots the training loss per step, and the held-out loss where it was measured, as a PNG; for GRPO, the reward."""
    rewards = any("eval_reward" in record for record in history)
    trained, measured = ("reward", "eval_reward") if rewards else ("loss", "eval_loss")
    with _plotted(path, [history], title) as axes:
        for key, label, style in ((trained, "training", "-"), (measured, "held out", "o--")):
            axes.plot(*_points(history, key), style, label=label)
        axes.legend()


def plot_losses(histories: dict[str, list[dict[str, Any]]], path: pathlib.Path) -> None:
    """Plots the losses of several runs, by their names, as a PNG."""
    title = "training (lines, mean of up to 10 steps) and held out (dots)"
    with _plotted(path, histories.values(), title) as axes:
        for i, (name, history) in enumerate(histories.items()):
            colour, style = f"C{i % 10}", ("-", "--", ":")[i // 10 % 3]
            steps, losses = _points(history, "loss")
            means = [statistics.fmean(losses[max(0, j - 9) : j + 1]) for j in range(len(losses))]
            axes.plot(steps, means, style, color=colour, label=name)
            axes.plot(*_points(history, "eval_loss"), "o", color=colour)
        if 0 < len(histories) <= _NAMED_CURVES:
            axes.legend(fontsize=7)
