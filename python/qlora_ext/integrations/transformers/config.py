"""``QLoRAConfig``: the quantization config of transformers and diffusers, also saved with a model."""

from __future__ import annotations

import copy
import difflib
import enum
import inspect
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from ... import bitsandbytes_format
from ..._internal.integrate import integrate
from ..._library import cuda_is_usable
from ...dtypes import computing_dtype, layers_dtype
from ...form import Form
from ...formats import EXACT, NF4, READ_IN, check_activations
from ...sizes import parse_size
from ...streaming import SOURCES
from ...untrusted import compiled_pattern

METHOD = "qlora_ext"
AUTO = "auto"
NEEDS = "import qlora_ext"  # written into saved models: what loading them requires
FORMAT_VERSION = 1  # of models whose 4-bit layers are NF4 of one form
_WITH_FORMS = 2  # of models with layers of other forms
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class _QuantMethod(str, enum.Enum):
    """The type of ``QLoRAConfig.quant_method``: equal to ``METHOD``, with the ``value`` that diffusers reads."""

    QLORA_EXT = METHOD

    __str__ = str.__str__


def _dtype_named(name: str, dtype: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        dtype = getattr(torch, _SHORT.get(dtype, dtype).removeprefix("torch."), dtype)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"{name}: expected a torch dtype or its name (bfloat16, float16, float32), got {reprlib.repr(dtype)}"
        )
    return dtype


def _compute_dtype_named(name: str, dtype: str | torch.dtype | None) -> torch.dtype | None:
    dtype = _dtype_named(name, dtype)
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"{name}: expected a floating-point torch dtype or its name, got {dtype!r}")
    return dtype


# Arguments of transformers' BitsAndBytesConfig, and our arguments with the same meaning.
_SAME = {
    "bnb_4bit_use_double_quant": "double_quant",
    "bnb_4bit_compute_dtype": "compute_dtype",
    "llm_int8_skip_modules": "skip_modules",
}
# Its arguments of which only one value is supported, with the reason or the alternative.
_REFUSED = {
    "load_in_4bit": (True, "QLoRAConfig quantizes to 4 bits; for a dense model, pass no quantization_config"),
    "load_in_8bit": (False, "LLM.int8() is not supported; use transformers' BitsAndBytesConfig for it"),
    "bnb_4bit_quant_type": ("nf4", "only NF4 is supported"),
    "llm_int8_enable_fp32_cpu_offload": (False, "layers on the CPU are 4-bit too; list dense ones in skip_modules"),
}
# Its arguments for LLM.int8(), which bitsandbytes' 4-bit layers ignore as well.
_WITHOUT_EFFECT = ("llm_int8_threshold", "llm_int8_has_fp16_weight")


def _take_bitsandbytes(arguments: dict[str, Any]) -> dict[str, Any]:
    """Removes BitsAndBytesConfig's arguments from ``arguments``, and returns their values by our names.

    Raises:
        ValueError: an argument has an unsupported value; the message names it.
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
    # Packed weights are always uint8. Viewing them as floats is not needed, because FSDP2 shards bytes too.
    _dtype_named("bnb_4bit_quant_storage", arguments.pop("bnb_4bit_quant_storage", None))
    ours = {_SAME[name]: arguments.pop(name) for name in _SAME if name in arguments}
    if "compute_dtype" in ours:
        ours["compute_dtype"] = _compute_dtype_named("bnb_4bit_compute_dtype", ours["compute_dtype"])
    return ours


def _meant(typed: str) -> str:
    ours = (name for name in inspect.signature(QLoRAConfig).parameters if name != "saved")
    known = {name.replace("_", ""): name for name in (*ours, *_SAME)}
    found = difflib.get_close_matches(typed.replace("_", "").lower(), known, n=1, cutoff=0.75)
    return f"; did you mean {known[found[0]]}?" if found else ""


def _is_described_by_arguments(form: Form) -> bool:
    """Whether the arguments of ``QLoRAConfig`` describe that form."""
    of_arguments = Form.of(
        block_size=form.block_size, double_quant=form.double_quant, nested_block_size=form.nested_block_size
    )
    return form == of_arguments


def _forms_of_layers(saved: Any) -> dict[str, Form]:
    """The forms of layers, by name, from a saved list of forms with the names of their layers.

    Raises:
        ValueError: an entry is damaged.
    """
    forms: dict[str, Form] = {}
    for entry in saved if isinstance(saved, list) else (saved,):
        try:
            keywords: dict[str, Any] = dict(entry)
            names = keywords.pop("layers")
            form = Form.of(**keywords)
            forms |= dict.fromkeys(names, form)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"forms: expected forms with the names of their layers, got {reprlib.repr(entry)} ({error})"
            ) from error
    return forms


class _OfInstances:
    """An instance attribute. Reading it from the class raises an error that points to the missing parentheses."""

    def __get__(self, instance: object, owner: type) -> NoReturn:
        raise AttributeError(f"expected a {owner.__name__}, got the class: write {owner.__name__}() with parentheses")


if TYPE_CHECKING:
    from typing_extensions import TypedDict, Unpack

    class _MoreArguments(TypedDict, total=False):
        """Further arguments: those of BitsAndBytesConfig, and the fields of a saved configuration."""

        load_in_4bit: bool
        load_in_8bit: bool
        bnb_4bit_quant_type: str
        bnb_4bit_compute_dtype: torch.dtype | str | None
        bnb_4bit_use_double_quant: bool
        bnb_4bit_quant_storage: torch.dtype | str | None
        llm_int8_skip_modules: list[str] | None
        llm_int8_threshold: float
        llm_int8_enable_fp32_cpu_offload: bool
        llm_int8_has_fp16_weight: bool
        quant_method: str
        format_version: int
        needs: str
        forms: list[dict[str, Any]]
        served: str | None


def default_device(device: torch.device | str | int | None) -> torch.device | str | int:
    """``device``, or the GPU if there is one, because models may load on the CPU and move."""
    if device is not None:
        return device
    return "cuda" if cuda_is_usable() else "cpu"


class QLoRAConfig(QuantizationConfigMixin):
    """Quantize to NF4 while loading: ``from_pretrained(path, quantization_config=QLoRAConfig())``.

    Models of transformers and diffusers take it, and so does diffusers' ``PipelineQuantizationConfig``. In diffusers'
    models no layer counts as an output head, and ``towers`` has no effect.

    Args:
        block_size: elements per scale: a power of two from 16 to 4096.
        double_quant: whether the scales are stored in 8 bits, in blocks of ``nested_block_size``.
        nested_block_size: scales per nested scale: from 1 to 2^20.
        compute_dtype: dtype of the quantized layers' products. "auto", the default, is the model's dtype, except for a
            bfloat16 model on a processor without bfloat16 arithmetic. On such a CPU (one without AVX512-BF16, AMX or
            ARM's BF16) it is float32, unless the CPU multiplies bfloat16 as integers, which is faster, and dense linear
            layers multiply in float32. Attention and norms stay in bfloat16 and are slow there, unless
            ``qlora_ext.nn.set_compute_dtype(model, torch.float32)`` makes the whole model compute in float32; then
            ``qlora_ext.nn.multiply_in_bfloat16(model)`` returns 4-bit layers to integers. On such a GPU (T4) it is
            float16; load the model with ``dtype=torch.float16``.
        skip_modules: names of modules that stay dense, with everything inside them: full names, last parts of names, or
            regular expressions. The default is the output heads of language models, classifiers and question-answering
            models. With ``[]``, every linear layer outside towers is quantized. Layers whose weight is tied to an
            embedding follow that embedding, even if they are named here.
        embeddings: whether to quantize embeddings too, each with the output head that is tied to it.
        towers: whether to quantize the layers of a multimodal model that are outside its language model: vision and
            audio towers, and projectors.
        stream: "ram" or "disk": load the frozen blocks when they are needed instead of keeping them on the computing
            device; see ``qlora_ext.streaming.stream``. "disk" needs a checkpoint that is already 4-bit. Threads that
            use such a model concurrently take turns at each layer.
        resident: with ``stream``, the memory that the weights may use on that device, such as "6GB".
        served: for adapters that are trained merge-aware for ``"q4_0"``, ``"iq4_nl"``, ``"int4"``, ``"mxfp4"`` or
            ``"nf4"``: quantize dense linear layers and experts to that format instead of NF4, except where a row is no
            multiple of its blocks.
        requantize: quantize the layers that a GGUF file, or a checkpoint of another library, stores packed like dense
            ones, instead of keeping their bits. Embeddings and output heads stay as stored.
        activations: "exact", the default, or "int8": round the inputs and gradients of 4-bit layers to int8, with a
            scale per token and 64 values, which is faster on a CPU; see ``qlora_ext.linear_nf4``. It is saved with a
            model in our format. If given, it replaces that of a saved model.

    ``stream`` and ``resident`` depend on the machine and are not saved. A checkpoint that is already 4-bit,
    in our format or in MXFP4, NVFP4, INT4, AWQ, GPTQ, MLX' or bitsandbytes' formats, keeps its codes, block sizes and
    scales. So do those in FP8 or INT8, and the layers, embeddings and output heads of a GGUF file, of 4 to 8 bits.

    Arguments of transformers' ``BitsAndBytesConfig`` work too: ``bnb_4bit_use_double_quant``,
    ``bnb_4bit_compute_dtype`` and ``llm_int8_skip_modules`` mean ``double_quant``, ``compute_dtype`` and
    ``skip_modules``. ``load_in_4bit=True``, ``bnb_4bit_quant_type="nf4"``, ``bnb_4bit_quant_storage`` and the arguments
    of LLM.int8() have no effect. Omitted arguments take our defaults, not bitsandbytes'.

    Raises:
        ValueError: an argument has a wrong type, is out of range, or requests an unsupported format (int8, FP4).
            TypeError: an argument is unknown.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModelForCausalLM
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128))
        >>> directory = tempfile.mkdtemp()
        >>> model.save_pretrained(directory)
        >>> config = qlora_ext.QLoRAConfig(block_size=128)
        >>> model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
        >>> model.model.layers[0].mlp.up_proj.block_size
        128
    """

    quant_method: Any = _OfInstances()

    def __init__(
        self,
        block_size: int = 64,
        double_quant: bool = True,
        nested_block_size: int = 256,
        compute_dtype: torch.dtype | str | None = AUTO,
        skip_modules: list[str] | None = None,
        embeddings: bool = False,
        towers: bool = False,
        stream: str | None = None,
        resident: str | int | None = None,
        activations: str | None = None,
        requantize: bool = False,
        **more: Unpack[_MoreArguments],
    ) -> None:
        integrate()
        saved: dict[str, Any] = {**more}
        theirs = _take_bitsandbytes(saved)
        double_quant = theirs.get("double_quant", double_quant)
        compute_dtype = theirs.get("compute_dtype", compute_dtype)
        skip_modules = theirs.get("skip_modules", skip_modules)
        Form.of(block_size=block_size, double_quant=double_quant, nested_block_size=nested_block_size)  # checks them
        flags = {"double_quant": double_quant, "embeddings": embeddings, "towers": towers, "requantize": requantize}
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise ValueError(f"{name}: expected True or False, got {reprlib.repr(flag)}")
        names = skip_modules if isinstance(skip_modules, list | tuple | set) else [] if skip_modules is None else [None]
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"skip_modules: expected a list of names, got {reprlib.repr(skip_modules)}")
        if activations is not None:
            check_activations(activations)
            self.activations = activations
        for name in skip_modules or ():
            compiled_pattern(name, "skip_modules")
        if stream not in (None, *SOURCES):
            raise ValueError(f"stream: expected 'ram', 'disk' or None, got {reprlib.repr(stream)}")
        if resident is not None and stream is None:
            raise ValueError("resident: expected with stream='ram' or 'disk', got stream=None")
        if resident is not None:
            parse_size("resident", resident)
        if saved.pop("quant_method", METHOD) != METHOD:
            raise ValueError("quant_method: expected a configuration saved by qlora_ext")
        if saved.pop("format_version", FORMAT_VERSION) not in (FORMAT_VERSION, _WITH_FORMS):
            raise ValueError("format_version: this checkpoint needs a newer version of qlora_ext")
        saved.pop("needs", None)
        self.forms = _forms_of_layers(saved.pop("forms", []))
        self.served: str | None = saved.pop("served", None)
        if self.served not in (None, *READ_IN):
            raise ValueError(f"served: expected {', '.join(READ_IN)} or None, got {reprlib.repr(self.served)}")
        if saved:
            raise TypeError(f"QLoRAConfig has no argument {', '.join(map(repr, saved))}{_meant(next(iter(saved)))}")
        self.quant_method = _QuantMethod.QLORA_EXT
        self.format_version = FORMAT_VERSION
        self.block_size = block_size
        self.double_quant = double_quant
        self.nested_block_size = nested_block_size
        chosen = None if compute_dtype == AUTO else _compute_dtype_named("compute_dtype", compute_dtype)
        self.compute_dtype: torch.dtype | str = AUTO if chosen is None else chosen
        self.skip_modules = None if skip_modules is None else list(skip_modules)
        self.embeddings = embeddings
        self.towers = towers
        self.stream = stream
        self.resident = resident
        self.requantize = requantize

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute. Those of BitsAndBytesConfig are mapped or rejected, as in the constructor."""
        given = {name: value}
        theirs = _take_bitsandbytes(given)
        for attribute, accepted in (given | theirs).items():
            super().__setattr__(attribute, accepted)

    @property
    def form(self) -> Form:
        """The form of the 4-bit weights that are quantized to NF4."""
        return Form.of(
            block_size=self.block_size, double_quant=self.double_quant, nested_block_size=self.nested_block_size
        )

    def form_of(self, layer: str, shapes: Collection[Sequence[int]] = ()) -> Form:
        """The form of the 4-bit weights of that layer.

        Args:
            shapes: of the layer's weights, if they are dense and may get the form of ``served``.
        """
        served = self.served_form
        if served is not None and shapes and all(shape[-1] % served.block_size == 0 for shape in shapes):
            return served
        return self.forms.get(layer, self.form)

    @property
    def served_form(self) -> Form | None:
        """The form of ``served``; None without one, or if it is NF4, which ``form`` describes."""
        return None if self.served in (None, NF4) else Form.named(self.served)

    def computing_dtype(self, model_dtype: torch.dtype, device: torch.device | str | int | None = None) -> torch.dtype:
        """The dtype in which the 4-bit modules of a model that has the given dtype compute.

        Args:
            device: the device that computes; the default is ``default_device``.
        """
        device = default_device(device)
        if isinstance(self.compute_dtype, torch.dtype):
            return self.compute_dtype
        return layers_dtype(model_dtype, self.dense_computing_dtype(model_dtype, device), device)

    def dense_computing_dtype(
        self, model_dtype: torch.dtype, device: torch.device | str | int | None = None
    ) -> torch.dtype:
        """The dtype in which the dense layers of such a model should multiply. Arguments as of ``computing_dtype``."""
        if isinstance(self.compute_dtype, torch.dtype):
            return self.compute_dtype
        return computing_dtype(model_dtype, default_device(device))

    def record(self, forms: Mapping[str, Form]) -> None:
        """Records the forms of a model's layers, which may come from a checkpoint, by the layers' names.

        Raises:
            ValueError: the layers that are NF4 differ in form.
        """
        self.forms = {name: form for name, form in forms.items() if not _is_described_by_arguments(form)}
        common = {form for name, form in forms.items() if name not in self.forms}
        if len(common) > 1:
            found = "; ".join(sorted(map(str, common)))
            raise ValueError(f"model: expected NF4 layers with one block size and scale form, got {found}")
        for form in common:
            self.block_size, self.double_quant = form.block_size, form.double_quant
            self.nested_block_size = form.nested_block_size

    def take_options(self, given: QLoRAConfig) -> None:
        """Takes the options of ``given`` that say how a saved model runs.

        Raises:
            ValueError: ``given`` quantizes it again.
        """
        if given.requantize:
            raise ValueError(
                "requantize: expected a dense model, a GGUF file or a checkpoint of another library, got a model that "
                "qlora_ext or bitsandbytes has quantized"
            )
        self.stream, self.resident = given.stream, given.resident
        self.activations = vars(given).get("activations", self.activations)

    def to_dict(self) -> dict[str, Any]:
        if self._source is not None and self._source.saved_config is not None:
            return copy.deepcopy(dict(self._source.saved_config))
        unsaved = ["forms", "stream", "resident", "served", "requantize"]
        unsaved += ["activations"] if self.activations == EXACT else []  # which earlier versions do not know
        fields = {k: v for k, v in vars(self).items() if not k.startswith("_") and k not in unsaved}
        fields |= {"quant_method": METHOD, "needs": NEEDS}
        fields["compute_dtype"] = str(self.compute_dtype).removeprefix("torch.")
        if self.forms:
            layers: dict[Form, list[str]] = {}
            for name, form in self.forms.items():
                layers.setdefault(form, []).append(name)
            fields["forms"] = [{**form.keywords, "layers": names} for form, names in layers.items()]
            fields["format_version"] = _WITH_FORMS
        return fields

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute, as transformers asks a configuration that was read from a file."""
        return getattr(self, name, default)

    @classmethod
    def from_bitsandbytes(cls, config: Any, stored: bool = False) -> QLoRAConfig:
        """The configuration that quantizes like a ``BitsAndBytesConfig``, and reads checkpoints saved with it.

        Args:
            config: the ``BitsAndBytesConfig`` of transformers or of diffusers, or its fields, as in the ``config.json``
                of a checkpoint.
            stored: whether it belongs to weights that are 4-bit already. These may be FP4; dense ones are quantized to
                NF4 only.

        Raises:
            ValueError: ``config`` is for int8 or FP4, or quantizes nothing. TypeError: ``config`` is not such a
                configuration.

        Example:
            >>> config = diffusers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
            >>> ours = QLoRAConfig.from_bitsandbytes(config)
            >>> unet = diffusers.UNet2DConditionModel.from_pretrained(path, quantization_config=ours)
        """
        if not isinstance(config, Mapping) and hasattr(config, "to_dict"):  # diffusers' class has another base
            config = config.to_dict()
        if not isinstance(config, Mapping) or config.get("quant_method", "bitsandbytes") != "bitsandbytes":
            raise TypeError(f"config: expected a BitsAndBytesConfig or its fields, got {reprlib.repr(config)}")
        if config.get("load_in_8bit"):
            raise ValueError("quantization_config: expected a bitsandbytes NF4 checkpoint, got int8 (LLM.int8())")
        if not config.get("load_in_4bit", True):
            raise ValueError(
                "quantization_config: expected a BitsAndBytesConfig with load_in_4bit=True, got one that quantizes "
                "nothing: load_in_4bit and load_in_8bit are False"
            )
        codes = bitsandbytes_format.CODES if stored else (NF4,)
        kind = config.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' own default
        if kind not in codes:
            expected, shown = " or ".join(code.upper() for code in codes), str(kind).upper()[:20]
            raise ValueError(f"quantization_config: expected a bitsandbytes {expected} checkpoint, got {shown}")
        storage = _dtype_named("bnb_4bit_quant_storage", config.get("bnb_4bit_quant_storage"))
        ours = cls(
            double_quant=bool(config.get("bnb_4bit_use_double_quant", False)),
            compute_dtype=config.get("bnb_4bit_compute_dtype"),
            skip_modules=config.get("llm_int8_skip_modules"),
        )
        ours._bitsandbytes_storage = storage or torch.uint8
        return ours

    # An attribute of the instance if it was given.
    activations: str = EXACT
    # The storage dtype of the packed bytes in a checkpoint that bitsandbytes wrote, else None.
    _bitsandbytes_storage: torch.dtype | None = None
    # A ``Spill`` that receives each quantized weight.
    _spill: Any = None
    # The ``Source`` of 4-bit weights that a checkpoint already has, in a format that is not ours.
    _source: Any = None
