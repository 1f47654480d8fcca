"""The options of ``export``, and its targets, whose modules are imported when a target is used."""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING, ClassVar

from ..options import REQUIRED, SavedOptions, like, option
from ..quantization.calibrate import CalibrationOptions

if TYPE_CHECKING:
    from .job import Job

# The file of ``--to nf4`` with the error of each layer.
MERGE_ERROR = "merge_error.json"
# The values of --check, and on how many tokens they measure the losses at most.
CHECKS = {"none": 0, "short": 2048, "full": 1 << 16}
# By how much 4 bits may raise the loss, in nats per token, and a target with more bits.
FOUR_BIT_LIMIT, DENSE_LIMIT = 0.3, 0.02


@dataclasses.dataclass(frozen=True)
class Target:
    """A format that ``export`` writes.

    Attributes:
        help: what comes out, for ``export --help``.
        module: its ``prepare`` checks that the target can hold what a request names, without reading weights.
        suffix: of the file that it is; None for a directory.
        max_loss_increase: by which the loss may exceed that of the trained model, in nats per token.
        has_embeddings: whether --embeddings says how it stores embeddings.
    """

    help: str
    module: str
    suffix: str | None = None
    max_loss_increase: float = FOUR_BIT_LIMIT
    has_embeddings: bool = False

    def prepare(self, request: ExportRequest) -> Job:
        """Calls the function of that name in the target's module."""
        job: Job = importlib.import_module(f".{self.module}", __package__).prepare(request)
        return job


# By the type of the matrices in a .gguf file.
_GGUF_LIMITS = {
    **dict.fromkeys(("f16", "bf16", "q8_0"), DENSE_LIMIT),
    **dict.fromkeys(("q4_0", "q4_1", "iq4_nl", "mxfp4", "same"), FOUR_BIT_LIMIT),
}
_COMPRESSED = "a directory in 4 bits for vLLM and SGLang"
_ADAPTER = "the adapter alone as a .gguf file"
_IN_GGUF = (
    "the merged model with its tokenizer as a .gguf file (same: the types of the base's file; gguf: same if it has "
    "any, or else q8_0)"
)
_FOR_OLLAMA = "a directory with such a file and a Modelfile"

# The types of embeddings and output head in the targets ``gguf:...`` and ``ollama:...``.
EMBEDDINGS = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "mxfp4")

TARGETS = {
    "dense": Target("a model directory in --dtype", "model_directories", max_loss_increase=DENSE_LIMIT),
    "nf4": Target("a directory in 4 bits for qlora_ext, in NF4 or the format of a 4-bit base", "model_directories"),
    "bitsandbytes": Target("a directory in NF4", "model_directories"),
    **{f"compressed-tensors:{kind}": Target(_COMPRESSED, "compressed_tensors") for kind in ("int4", "nvfp4", "mxfp4")},
    "gguf-adapter": Target(_ADAPTER, "gguf_adapter", ".gguf", DENSE_LIMIT),
    "gguf-adapter:f16": Target(_ADAPTER, "gguf_adapter", ".gguf", DENSE_LIMIT),
    "gguf": Target(_IN_GGUF, "gguf_model", ".gguf", has_embeddings=True),
    **{f"gguf:{kind}": Target(_IN_GGUF, "gguf_model", ".gguf", limit, True) for kind, limit in _GGUF_LIMITS.items()},
    "ollama": Target(_FOR_OLLAMA, "ollama", has_embeddings=True),
    **{f"ollama:{kind}": Target(_FOR_OLLAMA, "ollama", None, limit, True) for kind, limit in _GGUF_LIMITS.items()},
    "ollama:adapter": Target("the same with the adapter alone", "ollama", None, DENSE_LIMIT),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportRequest(SavedOptions, CalibrationOptions):
    """What ``export`` writes, where to, and how it checks the result."""

    command: ClassVar[str] = "export"

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

    @property
    def kind(self) -> str:
        """The type that the target's name has after a colon; empty for the target's only or default one."""
        return self.to.partition(":")[2]

    @property
    def result(self) -> str:
        """What the result is in, for people."""
        return self.to

    @property
    def typed(self) -> str:
        """The option that chose the target."""
        return f"--to {self.to}"
