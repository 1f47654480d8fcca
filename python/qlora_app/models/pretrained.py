"""Reads configuration, tokenizer and weights with transformers, and turns its errors into a ``UserError``."""

from __future__ import annotations

import contextlib
import io
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from qlora_ext.gguf import read_header
from qlora_ext.gguf.file import TABLES
from qlora_ext.untrusted import excerpt, printable, read_json

from ..errors import UserError, reading
from .sources import PROVENANCE, ModelSource

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAX_LAYERS = 10_000


@contextlib.contextmanager
def loading(what: str, source: ModelSource, shown: bool) -> Iterator[None]:
    """Shows or hides transformers' progress bar, and turns its errors into a ``UserError``."""
    import gguf  # noqa: F401  # raises a short error if it is missing; that of transformers fills a screen
    from transformers.utils import logging

    shown = shown and sys.stderr.isatty()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    # The reader of GGUF files has its own bar, which is hidden by redirecting stderr.
    on_hub = source.directory is None and source.gguf_file is None
    with (
        reading(what, source.name, on_hub),
        contextlib.nullcontext() if shown else contextlib.redirect_stderr(io.StringIO()),
    ):
        yield


def load_pretrained(what: str, source: ModelSource, loader: Any, shown: bool = False, **options: Any) -> Any:
    """Calls ``loader.from_pretrained`` for the model from ``source``.

    Args:
        what: the thing that is read, for the error message.
        loader: a class of transformers.
    """
    with loading(what, source, shown):
        return loader.from_pretrained(source.path, **source.options, **options)


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer, with a padding token.

    Raises:
        UserError: the model has no tokenizer, or its files are damaged.
    """
    from transformers import AutoTokenizer

    tokenizer = load_pretrained("tokenizer", source, AutoTokenizer)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(f"cannot load the tokenizer of {source.name}: it has no tokens; are its files missing?")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def restore_use_cache(model: Any, source: ModelSource) -> None:
    """Restores ``use_cache`` in the configuration of ``model`` to its value in ``source``.

    Loading disables it, because training and measuring need no cache. A saved model should have the original value.
    """
    model.config.use_cache = getattr(load_config(source), "use_cache", True)


def is_4bit(source: ModelSource) -> bool:
    """Whether the model's files are already quantized."""
    return source.gguf_file is None and getattr(load_config(source), "quantization_config", None) is not None


def has_4bit_blocks(source: ModelSource, tables: bool = False) -> bool:
    """Whether the model is a GGUF file with layers that are used as they are stored.

    Args:
        tables: count embeddings and output heads, too. A file with these alone is loaded like one of a dense model.
    """
    from qlora_ext.gguf.blocks import is_packed

    return source.gguf_file is not None and any(
        is_packed(tensor) and (tables or tensor.name not in TABLES)
        for tensor in read_header(pathlib.Path(source.path) / source.gguf_file).tensors
    )


def dense_name(source: ModelSource) -> str | None:
    """The name of the dense model that ``source`` is, or was quantized from; None if that is not recorded.

    Raises:
        UserError: the record is damaged.
    """
    if not is_4bit(source):
        return source.name
    path = None if source.directory is None else source.directory / PROVENANCE
    record = read_json(path, {"model?": str}) if path is not None and path.is_file() else {}
    name: str | None = record.get("model")
    return name


def load_config(source: ModelSource) -> Any:
    """The model's transformers configuration, before its weights are read.

    Raises:
        UserError: it is damaged, has an impossible number of layers, or would fetch code.
    """
    from transformers import AutoConfig

    from qlora_ext.integrations.transformers.stored_config import find_config

    if source.directory is not None:
        _check_config(read_json(source.directory / "config.json", dict), printable(source.name))
    config = load_pretrained("configuration", source, AutoConfig)
    if source.gguf_file is None:
        with loading("configuration", source, False):
            saved = find_config(config)
        if saved is not None:
            config.quantization_config = saved
    return config


def _check_config(config: dict[str, Any], name: str) -> None:
    for key, value in config.items():
        if isinstance(value, dict):
            _check_config(value, name)
        elif isinstance(value, int) and "layers" in key and value > _MAX_LAYERS:
            raise UserError(f"{name}: config.json has {key} {value}, expected at most {_MAX_LAYERS}")
        elif "implementation" in key and "/" in str(
            value
        ):  # kernels of the hub, which transformers would fetch and run
            raise UserError(f"{name}: config.json has {key} {excerpt(value)}, expected one of transformers' own")
