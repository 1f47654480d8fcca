"""``ExportRequest``: the options of ``export``."""

from __future__ import annotations

import dataclasses

from ..options import REQUIRED, SavedOptions, like, option
from ..quantization.calibrate import CalibrationOptions
from .targets import CHECKS, DENSE_LIMIT, EMBEDDINGS, FOUR_BIT_LIMIT, TARGETS


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportRequest(SavedOptions, CalibrationOptions):
    """What ``export`` writes, where to, and how it checks the result."""

    to: str = option(REQUIRED, "one of the targets above", choices=(*TARGETS,), metavar="TARGET")
    adapter: str | None = like(SavedOptions, "adapter")
    output: str = option(REQUIRED, "what is written", metavar="PATH")
    overwrite: bool = option(False, "replace what an earlier export wrote to --output")
    check: str = option(
        "short", f"short (default): compare on {CHECKS['short']:,} tokens; full; or none", choices=(*CHECKS,),
        metavar="LENGTH",
    )  # fmt: skip
    data: str | None = option(
        None, "text of the check, as in finetune, or self: the model writes it (default: what the run held out)",
        metavar="DATA|self",
    )  # fmt: skip
    max_loss_increase: float | None = option(
        None, f"limit in nats per token ({FOUR_BIT_LIMIT} in 4 bits, else {DENSE_LIMIT})"
    )
    embeddings: str | None = option(
        None,
        f"type of embeddings and output head in GGUF: {', '.join(EMBEDDINGS)} (default: q8_0 in 4 bits, else the "
        "target's)",
        choices=EMBEDDINGS, metavar="TYPE",
    )  # fmt: skip
