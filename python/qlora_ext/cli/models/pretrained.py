"""What transformers reads of a model's files: configuration, tokenizer, weights. Its errors become a ``UserError``."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import TYPE_CHECKING, Any

from ..._internal.untrusted import excerpt, printable, read_json
from ..errors import UserError, reading
from .sources import PROVENANCE, ModelSource

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAX_LAYERS = 10_000


@contextlib.contextmanager
def loading(what: str, source: ModelSource, shown: bool) -> Iterator[None]:
    """transformers' bar of progress is shown or not, and what it raises is a UserError."""
    import gguf  # noqa: F401  # transformers' own message for its absence spans a screen
    from transformers.utils import logging

    shown = shown and sys.stderr.isatty()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    # The reader of GGUF files has a bar of its own.
    on_hub = source.directory is None and source.gguf_file is None
    with (
        reading(what, source.name, on_hub),
        contextlib.nullcontext() if shown else contextlib.redirect_stderr(io.StringIO()),
    ):
        yield


def load_pretrained(what: str, source: ModelSource, loader: Any, shown: bool = False, **options: Any) -> Any:
    """``loader.from_pretrained``, a class of transformers', for ``what`` of the model from ``source``."""
    with loading(what, source, shown):
        return loader.from_pretrained(source.path, **source.options, **options)


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer, with a token to pad with.

    Raises:
        UserError: there is none, or its files are damaged.
    """
    from transformers import AutoTokenizer

    tokenizer = load_pretrained("tokenizer", source, AutoTokenizer)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(f"cannot load the tokenizer of {source.name}: it has no token; are its files there?")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def restore_use_cache(model: Any, source: ModelSource) -> None:
    """Restores ``use_cache`` in the configuration of ``model`` to its value in ``source``.

    Models are loaded to be trained and measured, which needs no cache; who loads what is saved may go by its word.
    """
    model.config.use_cache = getattr(load_config(source), "use_cache", True)


def is_4bit(source: ModelSource) -> bool:
    """Whether the files of the model are quantized already."""
    return source.gguf_file is None and getattr(load_config(source), "quantization_config", None) is not None


def dense_name(source: ModelSource) -> str | None:
    """The dense model that ``source`` is, or was quantized from, by its name; None where it does not say.

    Raises:
        UserError: what it says is damaged.
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
        UserError: it is damaged, of a size that no model has, or names code to be fetched.
    """
    from transformers import AutoConfig

    if source.directory is not None:
        _check_config(read_json(source.directory / "config.json", dict), printable(source.name))
    return load_pretrained("configuration", source, AutoConfig)


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
