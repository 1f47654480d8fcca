"""``QLoRAConfig``: what transformers is asked for, and what it writes into the configuration of a saved model."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...form import Form
from ...sizes import parse_size
from ...streaming import SOURCES

METHOD = "qlora_ext"
NEEDS = "import qlora_ext"  # what somebody who has only the saved model has to do before loading it
FORMAT_VERSION = 1


def _dtype_named(name: str, dtype: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name}: expected a torch dtype or its name, got {reprlib.repr(dtype)}")
    return dtype


def _compute_dtype_named(name: str, dtype: str | torch.dtype | None) -> torch.dtype | None:
    dtype = _dtype_named(name, dtype)
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"{name}: expected a floating torch dtype or its name, got {dtype!r}")
    return dtype


# Arguments of transformers' BitsAndBytesConfig that say the same as ours.
_SAME = {
    "bnb_4bit_use_double_quant": "double_quant",
    "bnb_4bit_compute_dtype": "compute_dtype",
    "llm_int8_skip_modules": "skip_modules",
}
# Those that ask for something else where they have another value than this, and why that is not here.
_REFUSED = {
    "load_in_4bit": (True, "QLoRAConfig quantizes to 4 bits; leave it out, and the model dense"),
    "load_in_8bit": (False, "LLM.int8() is not supported; use transformers' BitsAndBytesConfig for it"),
    "bnb_4bit_quant_type": ("nf4", "NF4 is the 4-bit format here"),
    "llm_int8_enable_fp32_cpu_offload": (False, "layers on the CPU are 4-bit, too; name those to keep in skip_modules"),
}
# Those that are about LLM.int8(), which bitsandbytes' 4-bit layers pass by as well.
_WITHOUT_EFFECT = ("llm_int8_threshold", "llm_int8_has_fp16_weight")


def _take_bitsandbytes(arguments: dict[str, Any]) -> dict[str, Any]:
    """Takes BitsAndBytesConfig's arguments out of ``arguments``, and returns what they say by the names of ours.

    Raises:
        ValueError: one asks for what is not here; the text names it.
    """
    if arguments.get("quant_method") == "bitsandbytes":  # all fields of such a configuration
        for name in ("quant_method", "_load_in_4bit", "_load_in_8bit"):
            arguments.pop(name, None)
    for name, (expected, why) in _REFUSED.items():
        found = arguments.pop(name, expected)
        if found != expected:
            raise ValueError(f"{name}: expected {expected!r}, got {reprlib.repr(found)}: {why}")
    for name in _WITHOUT_EFFECT:
        arguments.pop(name, None)
    # The bytes of a packed weight are always stored as bytes: FSDP2, for which others pose as floats, shards them.
    _dtype_named("bnb_4bit_quant_storage", arguments.pop("bnb_4bit_quant_storage", None))
    ours = {_SAME[name]: arguments.pop(name) for name in _SAME if name in arguments}
    if "compute_dtype" in ours:
        ours["compute_dtype"] = _compute_dtype_named("bnb_4bit_compute_dtype", ours["compute_dtype"])
    return ours


class QLoRAConfig(QuantizationConfigMixin):
    """Quantize to NF4 while loading: ``from_pretrained(path, quantization_config=QLoRAConfig())``.

    Args:
        block_size: elements a scale: a power of two from 32 to 4096.
        double_quant: whether the scales are themselves held in 8 bits, in blocks of ``nested_block_size``.
        nested_block_size: scales a nested scale: from 1 to 2^20.
        compute_dtype: of the quantized layers' products and biases; the model's dtype by default.
        skip_modules: names of modules to leave as they are, with all that is in them: full names, last parts of
            them or regular expressions. By default the output heads: the language model's, and those of classifiers
            and of models that answer questions. With ``[]`` every linear layer is quantized, but for towers. Layers
            whose weight is tied to an embedding's go with that embedding, whatever is said of them.
        embeddings: whether embeddings are quantized too, each with the output head that is tied to it.
        towers: whether, in a model of several modalities, layers outside of its language model are quantized too:
            those of vision and audio towers, and of projectors.
        stream: "ram" or "disk": the frozen blocks are not kept on the device that computes, but come in as they are
            needed; see ``qlora_ext.streaming.stream``. "disk" needs a checkpoint that is 4-bit already.
        resident: with ``stream``: the memory that the weights may take on that device, such as "6GB".

    ``stream`` and ``resident`` are about a machine, and are not saved.
    A checkpoint that is 4-bit already, ours or bitsandbytes' NF4, keeps its own block sizes and scale form.

    What is typed for transformers' ``BitsAndBytesConfig`` is understood: ``bnb_4bit_use_double_quant``,
    ``bnb_4bit_compute_dtype`` and ``llm_int8_skip_modules`` are ``double_quant``, ``compute_dtype`` and
    ``skip_modules``; ``load_in_4bit=True``, ``bnb_4bit_quant_type="nf4"``, ``bnb_4bit_quant_storage`` and what is about
    LLM.int8() alone change nothing. What is left out is as said above, not as there.

    Raises:
        ValueError: an argument is not of the kind or outside of the bounds given here, or asks for what is not here
            (int8, FP4). TypeError: there is no such one.
    """

    def __init__(
        self,
        block_size: int = 64,
        double_quant: bool = True,
        nested_block_size: int = 256,
        compute_dtype: torch.dtype | str | None = None,
        skip_modules: list[str] | None = None,
        embeddings: bool = False,
        towers: bool = False,
        stream: str | None = None,
        resident: str | int | None = None,
        **saved: Any,
    ) -> None:
        theirs = _take_bitsandbytes(saved)
        double_quant = theirs.get("double_quant", double_quant)
        compute_dtype = theirs.get("compute_dtype", compute_dtype)
        skip_modules = theirs.get("skip_modules", skip_modules)
        Form(torch.float32, block_size, double_quant, nested_block_size)  # the block sizes are checked
        for name, flag in (("double_quant", double_quant), ("embeddings", embeddings), ("towers", towers)):
            if not isinstance(flag, bool):
                raise ValueError(f"{name}: expected True or False, got {reprlib.repr(flag)}")
        names = skip_modules if isinstance(skip_modules, list | tuple | set) else [] if skip_modules is None else [None]
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"skip_modules: expected a list of names, got {reprlib.repr(skip_modules)}")
        if stream not in (None, *SOURCES):
            raise ValueError(f"stream: expected 'ram', 'disk' or None, got {reprlib.repr(stream)}")
        if resident is not None and stream is None:
            raise ValueError("resident: expected stream='ram' or 'disk' with it, got None")
        if resident is not None:
            parse_size("resident", resident)
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
        self.compute_dtype = _compute_dtype_named("compute_dtype", compute_dtype)
        self.skip_modules = None if skip_modules is None else list(skip_modules)
        self.embeddings = embeddings
        self.towers = towers
        self.stream = stream
        self.resident = resident

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
        fields = {k: v for k, v in vars(self).items() if not k.startswith("_") and k not in ("stream", "resident")}
        fields["needs"] = NEEDS
        if self.compute_dtype is not None:
            fields["compute_dtype"] = str(self.compute_dtype).removeprefix("torch.")
        return fields

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    @classmethod
    def from_bitsandbytes(cls, config: Mapping[str, Any] | QuantizationConfigMixin) -> QLoRAConfig:
        """The configuration that quantizes as transformers' ``BitsAndBytesConfig`` does, and reads what that has saved.

        Args:
            config: the ``BitsAndBytesConfig``, or its fields, as in the ``config.json`` of a checkpoint.

        Raises:
            ValueError: int8 or FP4. TypeError: no such configuration.
        """
        if isinstance(config, QuantizationConfigMixin):
            config = config.to_dict()
        if not isinstance(config, Mapping) or config.get("quant_method", "bitsandbytes") != "bitsandbytes":
            raise TypeError(f"config: expected a BitsAndBytesConfig or its fields, got {reprlib.repr(config)}")
        if config.get("load_in_8bit") or not config.get("load_in_4bit", True):
            raise ValueError("quantization_config: expected a bitsandbytes NF4 checkpoint, got int8 (LLM.int8())")
        kind = config.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' own default
        if kind != "nf4":
            shown = str(kind).upper()[:20]
            raise ValueError(f"quantization_config: expected a bitsandbytes NF4 checkpoint, got {shown}")
        storage = _dtype_named("bnb_4bit_quant_storage", config.get("bnb_4bit_quant_storage"))
        ours = cls(
            double_quant=bool(config.get("bnb_4bit_use_double_quant", False)),
            compute_dtype=config.get("bnb_4bit_compute_dtype"),
            skip_modules=config.get("llm_int8_skip_modules"),
        )
        ours._bitsandbytes_storage = storage or torch.uint8
        return ours

    # The dtype that the packed bytes pose as where bitsandbytes wrote the checkpoint; None: it wrote none.
    _bitsandbytes_storage: torch.dtype | None = None
    # A ``Spill`` that takes the weights as they are quantized.
    _spill: Any = None
