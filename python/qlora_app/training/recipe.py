"""The fine-tuning recipe: prepare, load, train, save."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING

from ..outputs.directory import Output, claim

if TYPE_CHECKING:
    from .run import Request, Run


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


class Recipe:
    """The phases of a run. Each phase updates the ``Run``.

    ``run`` executes all of them, with the output directory locked.
    """

    def __init__(self, request: Request) -> None:
        self.request = request

    def run(self) -> Finetuned:
        with claim(self.request.output, self.request.overwrite) as output:
            run = self.prepare(output)
            self.load(run)
            self.begin(run)
            self.train(run)
            return self.save(run)

    def prepare(self, output: Output) -> Run:
        """Checks the inputs and encodes the rows, before the weights are read."""
        from .prepare import prepare

        return prepare(self.request, output)

    def load(self, run: Run) -> None:
        """Loads the 4-bit base, and adds the adapter."""
        from .load import load

        load(run)

    def begin(self, run: Run) -> None:
        """Creates the directory of the run."""
        from .train import begin

        begin(run)

    def train(self, run: Run) -> None:
        """Trains the adapter, and saves checkpoints."""
        from .train import train

        train(run)

    def save(self, run: Run) -> Finetuned:
        """Saves the adapter, its record and the metrics."""
        from .save import save

        return Finetuned(run.directory, run.adapter, save(run))
