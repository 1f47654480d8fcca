"""The base and the adapter that the options of a command name."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import Any

from qlora_ext.formats import BLOCK_SIZES
from qlora_ext.untrusted import excerpt

from ..errors import UserError
from ..options import ACTIVATIONS, DEFAULT_RUN, BaseOptions
from .adapter_files import RECORD, base_of, check_files, find, load, record_of
from .devices import parse_computing_dtype, parse_device, parse_dtype
from .loading import Loader
from .pretrained import load_tokenizer
from .sources import ModelSource, resolve


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A base and an optional adapter. Both are checked before any weight of the base is read."""

    adapter: pathlib.Path | None
    loader: Loader
    force: bool
    tokenizer: Any

    @property
    def source(self) -> ModelSource:
        return self.loader.source

    def load(self) -> Any:
        """The 4-bit base with the adapter on it."""
        model = self.loader.while_loading()
        return model if self.adapter is None else load(model, self.adapter, self.force)

    def load_to_merge(self) -> Any:
        """Like ``load``, with the base and the adapter in float32, so that a merge rounds neither."""
        import torch

        from qlora_ext.nn import layers_of

        model = dataclasses.replace(self.loader, compute=torch.float32).while_loading()
        for _, layer in layers_of(model):
            layer.compute_dtype = torch.float32  # also where integers would multiply it in bfloat16
        return model if self.adapter is None else load(model, self.adapter, self.force)

    def load_to_answer(self) -> Any:
        """Like ``load``, for inference only."""
        from ..decoding import prepare_to_answer

        return prepare_to_answer(self.load())


def find_adapted(options: BaseOptions) -> Adapted:
    """Finds the base and the adapter that ``--model`` and ``--adapter`` name.

    Raises:
        UserError: one of them does not exist, or its files are damaged.
    """
    from qlora_ext.form import Form

    dtype, device = parse_dtype(options.dtype), parse_device(options.device)
    compute = parse_computing_dtype(options.dtype, device)
    block_size, activations = Form.block_size, options.activations
    path = None
    name = options.adapter
    if name is None and options.model is None:
        name = DEFAULT_RUN
        if not (pathlib.Path(name) / "adapter" / "adapter_config.json").is_file():
            raise UserError(f"--adapter: no adapter named, and none in ./{DEFAULT_RUN}; name an adapter, or a --model")
        print(f"qlora-ext: using the adapter in ./{name}; choose another with --adapter", file=sys.stderr)
    if name is None:
        assert options.model is not None
        source = resolve(options.model, options.trust_remote_code)
    else:
        path = find(name)
        source = base_of(path, options.model, options.trust_remote_code)
        settings = record_of(path).get("settings") or {}
        block_size = settings.get("block_size", block_size)
        if block_size not in BLOCK_SIZES:
            raise UserError(f"{path / RECORD}: expected a block_size of {BLOCK_SIZES}, got {block_size}")
        check_files(path)
        if activations is None:
            activations = settings.get("activations")
            if activations not in (None, *ACTIVATIONS):
                expected = ", ".join(ACTIVATIONS)
                raise UserError(f"{path / RECORD}: activations: expected {expected}, got {excerpt(activations)}")
    read_in: dict[str, Any] = {}
    if path is not None:
        from qlora_ext.integrations.peft.base_file import recorded_base_format, recorded_requantized

        read_in = {"served": recorded_base_format(path), "requantize": recorded_requantized(path)}
    loader = Loader(source, Form(block_size=block_size), dtype, device, compute, activations=activations, **read_in)
    return Adapted(path, loader, options.force, load_tokenizer(source))
