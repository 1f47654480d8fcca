"""The targets of ``export``. Their modules are imported when a target is used, because the parser needs the names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .job import Job
    from .request import ExportRequest

# The values of --check, and on how many tokens they measure the losses at most.
CHECKS = {"none": 0, "short": 2048, "full": 1 << 16}
# By how much 4 bits may raise the loss, in nats per token, and a target with more bits.
FOUR_BIT_LIMIT, DENSE_LIMIT = 0.3, 0.02


@dataclasses.dataclass(frozen=True)
class Target:
    """A format that ``export`` writes.

    Attributes:
        help: what comes out, for ``export --help``.
        prepare: checks that the target can hold what the request names, without reading weights.
        suffix: of the file that it is; None for a directory.
        max_loss_increase: by which the loss may exceed that of the trained model, in nats per token.
        has_embeddings: whether --embeddings says how it stores embeddings.
    """

    help: str
    prepare: Callable[[ExportRequest], Job]
    suffix: str | None = None
    max_loss_increase: float = FOUR_BIT_LIMIT
    has_embeddings: bool = False


def _dense(request: ExportRequest) -> Job:
    from . import model_directories

    return model_directories.dense(request)


def _bitsandbytes(request: ExportRequest) -> Job:
    from . import model_directories

    return model_directories.bitsandbytes(request)


def _compressed_tensors(request: ExportRequest) -> Job:
    from . import compressed_tensors

    return compressed_tensors.prepare(request, request.to.partition(":")[2])


def _gguf_adapter(request: ExportRequest) -> Job:
    from . import gguf_adapter

    return gguf_adapter.prepare(request, "float16" if request.to.endswith(":f16") else "float32")


def _gguf_model(request: ExportRequest) -> Job:
    from . import gguf_model

    return gguf_model.prepare(request, request.to.partition(":")[2].upper())


def _ollama(request: ExportRequest) -> Job:
    from . import ollama

    return ollama.prepare(request, request.to.partition(":")[2] or "q8_0")


# By the type of the matrices in a .gguf file.
_GGUF_LIMITS = {
    **dict.fromkeys(("f16", "bf16", "q8_0"), DENSE_LIMIT),
    **dict.fromkeys(("q4_0", "q4_1", "iq4_nl", "mxfp4"), FOUR_BIT_LIMIT),
}
_COMPRESSED = "a directory in 4 bits for vLLM and SGLang"
_ADAPTER = "the adapter alone as a .gguf file"
_IN_GGUF = "the merged model with its tokenizer as a .gguf file"
_FOR_OLLAMA = "a directory with such a file (ollama: q8_0) and a Modelfile"

# The types of embeddings and output head in the targets ``gguf:...`` and ``ollama:...``.
EMBEDDINGS = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "mxfp4")

TARGETS = {
    "dense": Target("a model directory in --dtype", _dense, max_loss_increase=DENSE_LIMIT),
    "bitsandbytes": Target("a directory in NF4", _bitsandbytes),
    **{f"compressed-tensors:{kind}": Target(_COMPRESSED, _compressed_tensors) for kind in ("int4", "nvfp4", "mxfp4")},
    "gguf-adapter": Target(_ADAPTER, _gguf_adapter, ".gguf", DENSE_LIMIT),
    "gguf-adapter:f16": Target(_ADAPTER, _gguf_adapter, ".gguf", DENSE_LIMIT),
    **{f"gguf:{kind}": Target(_IN_GGUF, _gguf_model, ".gguf", limit, True) for kind, limit in _GGUF_LIMITS.items()},
    "ollama": Target(_FOR_OLLAMA, _ollama, None, DENSE_LIMIT, True),
    **{f"ollama:{kind}": Target(_FOR_OLLAMA, _ollama, None, limit, True) for kind, limit in _GGUF_LIMITS.items()},
    "ollama:adapter": Target("the same with the adapter alone", _ollama, None, DENSE_LIMIT),
}
