"""The targets of ``export``. Their modules are imported when a target is used, because the parser needs the names."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .job import Job


@dataclasses.dataclass(frozen=True)
class Target:
    """A format that ``export`` writes.

    Attributes:
        help: what comes out, for ``export --help``.
        prepare: checks that the target can hold what the arguments name, without reading weights.
        suffix: of the file that it is; None for a directory.
    """

    help: str
    prepare: Callable[[argparse.Namespace], Job]
    suffix: str | None = None


def _dense(arguments: argparse.Namespace) -> Job:
    from . import model_directories

    return model_directories.dense(arguments)


def _bitsandbytes(arguments: argparse.Namespace) -> Job:
    from . import model_directories

    return model_directories.bitsandbytes(arguments)


def _compressed_tensors(arguments: argparse.Namespace) -> Job:
    from . import compressed_tensors

    return compressed_tensors.prepare(arguments, arguments.to.partition(":")[2])


def _gguf_adapter(arguments: argparse.Namespace) -> Job:
    from . import gguf_adapter

    return gguf_adapter.prepare(arguments, "float16" if arguments.to.endswith(":f16") else "float32")


def _gguf_model(arguments: argparse.Namespace) -> Job:
    from . import gguf_model

    return gguf_model.prepare(arguments, arguments.to.partition(":")[2].upper())


# The types of embeddings and output head in the targets ``gguf:...``.
EMBEDDINGS = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "mxfp4")

TARGETS = {
    "dense": Target("a model directory in --dtype, for programs that read no 4-bit format", _dense),
    "bitsandbytes": Target("a model directory in NF4 that loads with bitsandbytes", _bitsandbytes),
    "compressed-tensors:int4": Target("a model directory in INT4 for vLLM and SGLang", _compressed_tensors),
    "compressed-tensors:nvfp4": Target("the same in NVFP4", _compressed_tensors),
    "compressed-tensors:mxfp4": Target("the same in MXFP4", _compressed_tensors),
    "gguf-adapter": Target(
        "the LoRA adapter alone, in float32, as a .gguf file for llama.cpp and Ollama", _gguf_adapter, ".gguf"
    ),
    "gguf-adapter:f16": Target("the same in float16", _gguf_adapter, ".gguf"),
    **dict.fromkeys(
        ("gguf:f16", "gguf:bf16", "gguf:q8_0", "gguf:q4_0", "gguf:q4_1", "gguf:iq4_nl", "gguf:mxfp4"),
        Target("the merged model with its tokenizer, as a .gguf file in that type", _gguf_model, ".gguf"),
    ),
}
