"""``quantize --keep``: the layers that 4 bits cost the most stay in 16 bits, under a budget."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..terminal.bars import counted
from . import calibrate

if TYPE_CHECKING:
    from ...fidelity import LayerCost, Sensitivity
    from ...form import Form

# Of the text on which the layers are compared; short sequences, for each is one sample of every layer's cost.
TOKENS, LENGTH = 4096, 128


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keep", metavar="N|SHARE|SIZE",
        help="keep the layers in 16 bits that cost the most loss per byte in 4 bits: a number of layers (8), or as "
        "many as fit a percentage of the 4-bit model's size (5%%) or a size (200MB). Measured on the text of "
        "--calibrate, or one that the model writes",
    )  # fmt: skip


@dataclasses.dataclass
class Keeper:
    """Chooses the layers of a dense model that stay dense, and remembers why."""

    budget: str
    inputs: Any
    form: Form
    text: str
    seed: int
    calibrates: bool
    found: Sensitivity | None = None

    def __call__(self, model: Any) -> list[str]:
        from ...fidelity import sensitivity

        # A calibration's own bar is up already, and two would write over each other.
        with contextlib.nullcontext() if self.calibrates else counted("choosing layers") as progress:
            self.found = sensitivity(
                model,
                self.inputs,
                **self.form.keywords,
                tokens=TOKENS,
                length=LENGTH,
                seed=self.seed,
                progress=progress,
            )
        return self.found.keep(self.budget)

    def kept(self) -> list[LayerCost]:
        """The layers that it chose, the most costly first."""
        assert self.found is not None
        return self.found.chosen(self.budget)

    def record(self) -> dict[str, Any]:
        """What is kept beside the model: which layers are dense, and what each would have cost in 4 bits."""
        assert self.found is not None
        kept = self.kept()
        return {
            "budget": self.budget,
            "inputs": self.text,
            "tokens": TOKENS if isinstance(self.inputs, str) else self.inputs.numel(),
            "seed": self.seed,
            "extra_bytes": sum(layer.extra_bytes for layer in kept),
            "dense": [layer.name for layer in kept],
            "layers": [dataclasses.asdict(layer) for layer in self.found.layers],
        }

    def told(self) -> str:
        """What is said of it at the end."""
        assert self.found is not None
        kept, whole = self.kept(), sum(layer.loss for layer in self.found.layers)
        share = sum(layer.loss for layer in kept) / whole if whole > 0 else 0.0
        return (
            f"kept {len(kept)} of {len(self.found.layers)} layers in 16 bits, "
            f"{sum(layer.extra_bytes for layer in kept) / 1e6:.1f} MB more: they make an estimated {share:.0%} of what "
            "4 bits would cost"
        )


def keeper(arguments: argparse.Namespace, tokenizer: Any, form: Form) -> Keeper | None:
    """What ``--keep`` asks for; None without it.

    Raises:
        UserError: it is no budget, or there is too little text.
    """
    if arguments.keep is None:
        return None
    from ...fidelity import allowance

    try:
        allowance(arguments.keep, 0)
    except ValueError:
        raise UserError(
            f"--keep {arguments.keep}: expected a number of layers, a share such as 5% or a size such as 200MB"
        ) from None
    own = arguments.calibrate in ("self", "none")
    return Keeper(
        arguments.keep,
        "self" if own else calibrate.tokens_of(arguments.calibrate, tokenizer, TOKENS, LENGTH),
        form,
        "self" if own else arguments.calibrate,
        arguments.calibration_seed,
        arguments.calibrate != "none",
    )
