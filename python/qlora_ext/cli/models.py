"""A model and its tokenizer: loaded in 4 bits, checked, weighed, and asked to go on with a text."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import math
import pathlib
import sys
import warnings
from typing import TYPE_CHECKING, Any

from .._outside import excerpt, printable, read_json
from . import whole
from .errors import UserError, first_line, reading
from .sources import PROVENANCE, ModelSource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from ..calibration import Calibration, InitLora
    from ..integrations.transformers.spill import Spill
    from .gguf_weights import GGUFWeights

DTYPES = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "float32": "float32",
    "fp32": "float32",
}
AUTO = "auto"
_MAX_LAYERS = 10_000


def check_dtype(name: str) -> None:
    """Checks a ``--dtype``.

    Raises:
        UserError: there is no such one.
    """
    if name not in (AUTO, *DTYPES):
        raise UserError(f"--dtype {name}: expected {AUTO}, bfloat16, float16 or float32")


def parse_dtype(name: str) -> torch.dtype:
    """The dtype to which ``--dtype`` rounds the weights that are not 4-bit; "auto" is bfloat16, as models come."""
    import torch

    check_dtype(name)
    dtype: torch.dtype = getattr(torch, DTYPES.get(name, "bfloat16"))
    return dtype


def named(dtype: torch.dtype) -> str:
    """The name of a dtype as ``--dtype`` takes it."""
    return str(dtype).removeprefix("torch.")


def parse_computing_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype on ``device`` for the value of ``--dtype``.

    With "auto", a CPU without bfloat16 arithmetic computes in float32, with the same weights and 4-bit codes as other
    machines, so an adapter trained on one fits the other.
    """
    from ..dtypes import computing_dtype

    dtype = parse_dtype(name)
    return computing_dtype(dtype, device) if name == AUTO else dtype


def parse_device(name: str) -> torch.device:
    """The device that a user named; "auto" is CUDA where torch finds one and our kernels for it are built."""
    import torch

    import qlora_ext

    info = qlora_ext.build_info()
    if name == "auto":
        return torch.device("cuda" if info["cuda_available"] else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not info["cuda_available"]:
        raise UserError(f"--device {name}: no CUDA here ({info['cuda_error'] or 'torch finds no device'})")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA device(s)")
    return device


@contextlib.contextmanager
def _loading(what: str, source: ModelSource, shown: bool) -> Iterator[None]:
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


def _load(what: str, source: ModelSource, loader: Any, shown: bool = False, **options: Any) -> Any:
    with _loading(what, source, shown):
        return loader.from_pretrained(source.path, **source.options, **options)


def _gguf_weights(source: ModelSource, config: Any) -> GGUFWeights | None:
    """The weights of a GGUF file one by one; None of another source, or where transformers reads it whole only."""
    from .gguf_weights import GGUFWeights

    if source.gguf_file is None:
        return None
    skeleton = whole.skeleton(source, config)
    with _loading("model", source, False):
        try:
            return GGUFWeights(pathlib.Path(source.path) / source.gguf_file, skeleton)
        except NotImplementedError:
            return None


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer, with a token to pad with.

    Raises:
        UserError: there is none, or its files are damaged.
    """
    from transformers import AutoTokenizer

    tokenizer = _load("tokenizer", source, AutoTokenizer)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(f"cannot load the tokenizer of {source.name}: it has no token; are its files there?")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextlib.contextmanager
def _cast(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Casts all floating tensors of a dense ``model`` to ``dtype``, and each back to its own dtype after the block."""

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        return itertools.chain(model.named_parameters(), model.named_buffers())

    before = {name: t.dtype for name, t in tensors() if t.is_floating_point()}
    model.to(dtype)
    yield
    for name, t in tensors():
        if t.is_floating_point() and name in before:
            t.data = t.data.to(before[name])


def _compute_in(model: Any, dtype: torch.dtype, compute: torch.dtype) -> None:
    """Makes a model with weights in ``dtype`` compute in ``compute``. Weights that transformers keeps in float32 stay
    so."""
    from ..nn import layers_of

    if compute != dtype:
        model.to(compute)
    for _, layer in layers_of(model):
        layer.to(compute)


def load_quantized(
    source: ModelSource,
    dtype: torch.dtype,
    device: torch.device,
    block_size: int = 64,
    double_quant: bool = True,
    calibration: Calibration | None = None,
    init_lora: InitLora | None = None,
    keep: Callable[[Any], list[str]] | None = None,
    stream: str | None = None,
    resident: str | None = None,
    spill: Spill | None = None,
    embeddings: bool = False,
    compute: torch.dtype | None = None,
) -> Any:
    """The model in 4 bits, quantized while loading where transformers can, with its other weights in ``dtype``.

    One that is to be calibrated, or of which layers are to be chosen, is loaded dense: it has to run. So is one for
    which adapters are to be found.

    Args:
        keep: names the layers of the dense model that stay dense.
        stream, resident: as in ``QLoRAConfig``.
        spill: takes the weights as they are quantized; then ``device`` is the CPU.
        embeddings: embeddings too, each with the output head that is tied to it.
        compute: the dtype in which the model computes: its other weights are then cast to it, the 4-bit ones being
            those of ``dtype``.

    Raises:
        UserError: a weight is missing, of another shape, NaN, or in the files and not in the model.
    """
    from transformers import AutoModelForCausalLM

    import qlora_ext

    from .. import streaming
    from ..dtypes import computing_dtype
    from ..integrations.transformers.spill import spilling

    form: dict[str, Any] = {"block_size": block_size, "double_quant": double_quant, "embeddings": embeddings}
    model_config = load_config(source)
    whole.check_room(source, model_config)
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    dense_first = calibration is not None or init_lora is not None or keep is not None
    weights = None if dense_first else _gguf_weights(source, model_config)
    # transformers combines no quantization with a GGUF file that it reads itself.
    while_loading = not dense_first and (source.gguf_file is None or weights is not None)
    if while_loading:
        config = qlora_ext.QLoRAConfig(**form, stream=stream, resident=resident)
        if spill is not None:
            config = spilling(config, spill)
        options |= {"device_map": {"": device}, "quantization_config": config}
    with warnings.catch_warnings():
        # A saved 4-bit model keeps its own form, which is known here.
        warnings.filterwarnings("ignore", "You passed `quantization_config`", UserWarning)
        if weights is None:
            model, report = _load("model", source, AutoModelForCausalLM, shown=spill is not None, **options)
        else:
            with _loading("model", source, shown=spill is not None):
                model, report = weights.load(**options)
            report["unexpected_keys"] = {*report["unexpected_keys"], *weights.unknown}
    whole.check_report(source, model, report)
    if not while_loading:
        streamed = stream is not None and device.type != "cpu"
        runs = calibration is not None or keep is not None
        try:
            if runs:
                model.to(device)
            with _cast(model, computing_dtype(dtype, device)) if runs else contextlib.nullcontext():
                kept = () if keep is None else keep(model)
                qlora_ext.quantize_model(
                    model, calibration=calibration, init_lora=init_lora, keep=kept, compute_dtype=dtype, **form
                )
        except UserError:
            raise
        except ValueError as error:  # a NaN, with its place
            raise UserError(f"cannot quantize {source.name}: {first_line(error)}") from error
        if streamed:
            streaming.stream(model, resident, "ram", device)
        else:
            model.to(device)
    whole.check_finite(source, model.state_dict().items())
    model.config.use_cache = False
    if compute is not None:
        _compute_in(model, dtype, compute)
    return model


def restore_use_cache(model: Any, source: ModelSource) -> None:
    """Restores ``use_cache`` in the configuration of ``model`` to its value in ``source``.

    Models are loaded to be trained and measured, which needs no cache; who loads what is saved may go by its word.
    """
    model.config.use_cache = getattr(load_config(source), "use_cache", True)


def load_dense(
    source: ModelSource, dtype: torch.dtype, device: torch.device, compute: torch.dtype | None = None
) -> Any:
    """The model as it is, in ``dtype``; or its weights of that dtype cast to ``compute``.

    Raises:
        UserError: as for ``load_quantized``.
    """
    from transformers import AutoModelForCausalLM

    whole.check_room(source, load_config(source))
    model, report = _load("model", source, AutoModelForCausalLM, dtype=dtype, output_loading_info=True)
    whole.check_report(source, model, report)
    whole.check_finite(source, model.state_dict().items())
    model.config.use_cache = False
    if compute is not None:
        _compute_in(model, dtype, compute)
    return model.eval().to(device)


def prepare_to_answer(model: Any) -> Any:
    """``model``, with an adapter or without, made ready for inference alone.

    The fused adapters are cast to the dtype in which each call would cast them. A dense output head is given the last
    token of a prompt with the strides of a matrix: those of a slice have torch take a batched product, for which it
    copies the head (0.34 s for 32,000 x 2048 bfloat16 on two cores, more than all layers take for 8 tokens).
    """
    import torch

    from ..integrations.peft import cast_fused

    def as_matrix(head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return inputs[0].flatten(0, -2).unflatten(0, inputs[0].shape[:-1]), *inputs[1:]

    model.eval().requires_grad_(False)
    cast_fused(model)
    head = model.get_output_embeddings()
    if type(head) is torch.nn.Linear:
        head.register_forward_pre_hook(as_matrix)
    return model


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
    return _load("configuration", source, AutoConfig)


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


def dense_share(model: Any) -> str | None:
    """A line about linear weights that stayed dense unasked; None if there are hardly any."""
    from ..nn import coverage

    found = coverage(model)
    return f"linear  {found}" if found.is_worth_telling else None


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model's size: its parameters, their bytes in the compute dtype, and their bytes as they are, with scales."""

    parameters: int
    dense_bytes: int
    bytes: int


def weigh(model: Any) -> Weights:
    """The size of a 4-bit model's weights. A tensor that several modules share counts once."""
    from qlora_ext.nn import Packed4bit, scale_names

    parameters = dense = held = 0
    seen: set[int] = set()
    for module in model.modules():
        shapes = module.packed_shapes if isinstance(module, Packed4bit) else {}
        scales = {scale for weight in shapes for scale in scale_names(weight).values()}
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            held += tensor.nbytes
            if name not in scales:
                count = math.prod(shapes[name]) if name in shapes else tensor.numel()
                parameters += count
                dense += count * (module.compute_dtype.itemsize if name in shapes else tensor.element_size())
    return Weights(parameters, dense, held)


def complete(
    model: Any,
    tokenizer: Any,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    streamer: Any = None,
) -> str:
    """How the model goes on after the token ids ``prompt``. Without temperature it draws no random number.

    Args:
        streamer: one of transformers', which gets every token as soon as it is there.
    """
    import torch

    was_training = model.training
    model.eval()
    ids = torch.tensor([prompt], dtype=torch.int64, device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
            streamer=streamer,
            **sampling,
        )
    model.train(was_training)
    text: str = tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
    return text
