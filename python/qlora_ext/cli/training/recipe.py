"""Fine-tuning, in the order in which it happens: prepare, load, train, save."""

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
        directory: of the run, where ``metrics.jsonl`` and ``loss.png`` are. adapter: of PEFT, in it.
        metrics: ``steps``, and what was measured on the held-out rows, such as ``perplexity_before`` and
            ``perplexity_after``.
    """

    directory: pathlib.Path
    adapter: pathlib.Path
    metrics: dict[str, float]


class Recipe:
    """The phases of a run, each of which takes the ``Run`` one step further.

    ``run`` goes through all of them, with the output directory locked.
    """

    def __init__(self, request: Request) -> None:
        self.request = request

    def run(self) -> Finetuned:
        with claim(self.request.output, self.request.overwrite) as output:
            run = self.prepare(output)
            self.load(run)
            self.train(run)
            return self.save(run)

    def prepare(self, output: Output) -> Run:
        """The run, its inputs checked and its rows encoded, before the weights are read."""
        from .prepare import prepare

        return prepare(self.request, output)

    def load(self, run: Run) -> None:
        """Puts the 4-bit base into the run, with the adapter on it."""
        from .load import load

        load(run)

    def train(self, run: Run) -> None:
        """Trains the adapter, with checkpoints to go on from."""
        from .train import train

        train(run)

    def save(self, run: Run) -> Finetuned:
        """Saves the adapter, its record and the metrics."""
        from .save import save

        return Finetuned(run.directory, run.adapter, save(run))
