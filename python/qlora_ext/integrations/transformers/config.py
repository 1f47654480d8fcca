"""``QLoRAConfig``: what transformers is asked for, and what it writes into the configuration of a saved model."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...form import Form

METHOD = "qlora_ext"
NEEDS = "import qlora_ext"  # what somebody who has only the saved model has to do before loading it
FORMAT_VERSION = 1


def _dtype_named(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"compute_dtype: expected a floating torch dtype or its name, got {dtype!r}")
    return dtype


class QLoRAConfig(QuantizationConfigMixin):
    """Quantize to NF4 while loading: ``from_pretrained(path, quantization_config=QLoRAConfig())``.

    Args:
        block_size: elements a scale: a power of two from 32 to 4096.
        double_quant: whether the scales are themselves held in 8 bits, in blocks of ``nested_block_size``.
        nested_block_size: scales a nested scale: from 1 to 2^20.
        compute_dtype: of the quantized layers' products and biases; the model's dtype by default.
        skip_modules: names of modules to leave as they are, with all that is in them: full names, last parts of
            them or regular expressions. By default the output head; with ``[]`` every linear layer is quantized.
            Layers whose weight is tied to an embedding's go with that embedding, whatever is said of them.
        embeddings: whether embeddings are quantized too, each with the output head that is tied to it.

    A checkpoint that is 4-bit already, ours or bitsandbytes' NF4, keeps its own block sizes and scale form.

    Raises:
        ValueError: an argument is not of the kind or outside of the bounds given here. TypeError: there is no such one.
    """

    def __init__(
        self,
        block_size: int = 64,
        double_quant: bool = True,
        nested_block_size: int = 256,
        compute_dtype: torch.dtype | str | None = None,
        skip_modules: list[str] | None = None,
        embeddings: bool = False,
        **saved: Any,
    ) -> None:
        Form(torch.float32, block_size, double_quant, nested_block_size)  # the block sizes are checked
        for name, flag in (("double_quant", double_quant), ("embeddings", embeddings)):
            if not isinstance(flag, bool):
                raise ValueError(f"{name}: expected True or False, got {reprlib.repr(flag)}")
        names = skip_modules if isinstance(skip_modules, list | tuple | set) else [] if skip_modules is None else [None]
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"skip_modules: expected a list of names, got {reprlib.repr(skip_modules)}")
        if saved.pop("quant_method", METHOD) != METHOD:
            raise ValueError("quant_method: expected a configuration that qlora_ext saved")
        if saved.pop("format_version", FORMAT_VERSION) != FORMAT_VERSION:
            raise ValueError("format_version: this checkpoint needs a newer qlora_ext")
        saved.pop("needs", None)
        if saved:
            raise TypeError(f"QLoRAConfig has no argument {', '.join(map(repr, saved))}")
        self.quant_method = METHOD
        self.format_version = FORMAT_VERSION
        self.block_size = block_size
        self.double_quant = double_quant
        self.nested_block_size = nested_block_size
        self.compute_dtype = _dtype_named(compute_dtype)
        self.skip_modules = None if skip_modules is None else list(skip_modules)
        self.embeddings = embeddings

    def form(self, model_dtype: torch.dtype) -> Form:
        """The form of the 4-bit modules of a model of that dtype."""
        dtype = self.compute_dtype or model_dtype
        return Form(dtype, self.block_size, self.double_quant, self.nested_block_size)

    def record(self, form: Form | None) -> None:
        """Notes the block sizes and scale form that a model's modules have, which a checkpoint may have chosen."""
        if form is not None:
            self.block_size, self.double_quant = form.block_size, form.double_quant
            self.nested_block_size = form.nested_block_size

    def to_dict(self) -> dict[str, Any]:
        fields = {key: value for key, value in vars(self).items() if not key.startswith("_")}
        fields["needs"] = NEEDS
        if self.compute_dtype is not None:
            fields["compute_dtype"] = str(self.compute_dtype).removeprefix("torch.")
        return fields

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    @classmethod
    def from_bitsandbytes(cls, saved: dict[str, Any]) -> QLoRAConfig:
        """The configuration that reads a checkpoint which bitsandbytes quantized, from its ``quantization_config``.

        Raises:
            ValueError: an int8 or FP4 checkpoint, which has no NF4 weights.
        """
        if saved.get("load_in_8bit") or not saved.get("load_in_4bit", True):
            raise ValueError("quantization_config: expected a bitsandbytes NF4 checkpoint, got int8 (LLM.int8())")
        kind = saved.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' own default
        if kind != "nf4":
            shown = str(kind).upper()[:20]
            raise ValueError(f"quantization_config: expected a bitsandbytes NF4 checkpoint, got {shown}")
        storage = getattr(torch, str(saved.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch."), None)
        if not isinstance(storage, torch.dtype):
            found = reprlib.repr(saved["bnb_4bit_quant_storage"])
            raise ValueError(f"quantization_config: expected a torch dtype as bnb_4bit_quant_storage, got {found}")
        config = cls(
            double_quant=bool(saved.get("bnb_4bit_use_double_quant", False)),
            skip_modules=saved.get("llm_int8_skip_modules"),
        )
        config._bitsandbytes_storage = storage
        return config

    # The dtype that the packed bytes pose as in the checkpoint, where bitsandbytes wrote it.
    _bitsandbytes_storage: torch.dtype | None = None
