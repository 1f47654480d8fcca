"""``quantize --keep``: the layers whose 4 bits cost the most stay in 16 bits, within a budget."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..terminal.bars import counted
from . import calibrate

if TYPE_CHECKING:
    from qlora_ext.fidelity import LayerCost, Sensitivity
    from qlora_ext.form import Form

# Size of the text on which the layers are compared. Sequences are short, because each is one sample per layer.
TOKENS, LENGTH = 4096, 128


@dataclasses.dataclass
class MixedPrecision:
    """Chooses the layers of a dense model that stay dense, and records why."""

    budget: str
    inputs: Any
    form: Form
    text: str
    seed: int
    calibrates: bool
    found: Sensitivity | None = None

    def __call__(self, model: Any) -> list[str]:
        from qlora_ext.fidelity import sensitivity

        # The calibration already shows a bar, and two bars would overwrite each other.
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

    def dense_layers(self) -> list[LayerCost]:
        """The chosen layers, the most costly first."""
        assert self.found is not None
        return self.found.chosen(self.budget)

    def record(self) -> dict[str, Any]:
        """The record that is saved with the model: the dense layers, and the cost of each layer in 4 bits."""
        assert self.found is not None
        dense = self.dense_layers()
        return {
            "budget": self.budget,
            "inputs": self.text,
            "tokens": TOKENS if isinstance(self.inputs, str) else self.inputs.numel(),
            "seed": self.seed,
            "extra_bytes": sum(layer.extra_bytes for layer in dense),
            "dense": [layer.name for layer in dense],
            "layers": [dataclasses.asdict(layer) for layer in self.found.layers],
        }

    def summary(self) -> str:
        """The line that the command prints about the choice."""
        assert self.found is not None
        dense, total = self.dense_layers(), sum(layer.loss for layer in self.found.layers)
        share = sum(layer.loss for layer in dense) / total if total > 0 else 0.0
        return (
            f"kept {len(dense)} of {len(self.found.layers)} layers in 16 bits "
            f"(+{sum(layer.extra_bytes for layer in dense) / 1e6:.1f} MB), which avoids an estimated {share:.0%} of "
            "the loss that 4 bits cost"
        )


def from_options(
    keep: str | None, options: calibrate.CalibrationOptions, tokenizer: Any, form: Form
) -> MixedPrecision | None:
    """The choice of layers that ``--keep`` specifies; None without it.

    Raises:
        UserError: the value is not a budget, or the text is too short.
    """
    if keep is None:
        return None
    from qlora_ext.fidelity import allowance

    try:
        allowance(keep, 0)
    except ValueError:
        raise UserError(
            f"--keep {keep}: expected a number of layers, a share such as 5% or a size such as 200MB"
        ) from None
    own = options.text in ("self", "none")
    return MixedPrecision(
        keep,
        "self" if own else calibrate.tokens_of(options, tokenizer, TOKENS, LENGTH),
        form,
        "self" if own else options.text,
        options.calibration_seed,
        options.text != "none",
    )
