"""Loads the compiled operators into torch, and reports what was loaded."""

from __future__ import annotations

import ctypes
import pathlib
import sys
from typing import Any

import torch
from torch._ops import OpOverload
from torch.nested._internal.nested_tensor import NestedTensor

from . import _C
from .dtypes import native_bfloat16

OPERATORS = (
    "quantize_nf4",
    "search_absmax_nf4",
    "encode_nf4",
    "encode_nf4_stochastic",
    "merge_lora_nf4",
    "quantize_absmax",
    "dequantize_absmax",
    "dequantize_nf4",
    "linear_nf4",
    "linear_nf4_with_h",
    "linear_nf4_dx",
    "linear_nf4_dx_with_g",
    "linear_nf4_dlora",
    "linear_dense",
    "linear_dense_dx",
    "grouped_linear_nf4",
    "grouped_linear_nf4_with_h",
    "grouped_linear_nf4_dx",
    "grouped_linear_nf4_dx_with_g",
    "grouped_linear_nf4_dlora",
)
# Dispatch keys of sparse and nested tensors. Jagged ones have a class of their own.
_NOT_DENSE = (
    *("SparseCPU", "SparseCsrCPU", "NestedTensorCPU", "AutogradNestedTensor"),
    *("SparseCUDA", "SparseCsrCUDA", "NestedTensorCUDA"),
)


def _find(name: str) -> str | None:
    # The libraries are next to _C. In an editable install, this file is in another directory.
    files = [pathlib.Path(_C.__file__).with_name(name + suffix) for suffix in _suffixes(sys.platform)]
    return next((str(file) for file in files if file.is_file()), None)


def _suffixes(platform: str) -> tuple[str, ...]:
    """What the names of our libraries may end with: CMake's names for modules, and for libraries to link to."""
    return {"win32": (".dll",), "darwin": (".so", ".dylib")}.get(platform, (".so",))


def _require_torch() -> None:
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) < (2, 11):
        raise ImportError(f"qlora_ext needs torch 2.11 or newer, found {torch.__version__}: pip install -U torch")


def _load_cpu() -> None:
    _C.cpu_isa()  # raises if QLORA_CPU_ISA names an instruction set that this processor lacks
    library = _find("libqlora_cpu")
    if library is None:
        raise ImportError("qlora_ext: libqlora_cpu is missing from the package; reinstall it")
    torch.ops.load_library(library)


def link_compiled_code() -> None:
    """Makes the functions of ``cpp/ops/c_shims.cpp`` visible to code that AOTInductor compiles."""
    ctypes.CDLL(_find("libqlora_cpu"), ctypes.RTLD_GLOBAL)  # loaded already, but with local symbols


def _load_cuda() -> str | None:
    """Loads the CUDA operators. Returns the reason if that is impossible, else None."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    library = _find("libqlora_cuda")
    if library is None:
        return "qlora_ext was built without nvcc"
    try:
        torch.ops.load_library(library)
    except OSError as error:  # libcudart.so.13 is missing
        return (
            f"{error.__cause__ or error}: expected a torch built for CUDA 13, which needs an NVIDIA driver of version "
            f"580 or newer; this torch is built for CUDA {torch.version.cuda}"
        )
    return None


def _explain_on_cuda(reason: str) -> None:
    """Makes every operator raise ``reason`` for CUDA tensors, instead of torch's list of registered backends."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"qlora_ext has no CUDA kernels here: {reason}")

    for name in OPERATORS:
        LIBRARY.impl(name, refuse, "CUDA")


def _explain_layouts() -> None:
    """Makes every operator name the tensor that is sparse or nested, instead of torch's list of registered backends."""

    def refuse(operator: OpOverload, args: tuple[Any, ...]) -> Any:
        for argument, a in zip(operator._schema.arguments, args, strict=False):
            if isinstance(a, torch.Tensor) and (a.is_nested or a.layout != torch.strided):
                kind = "nested" if a.is_nested else a.layout
                raise ValueError(f"{argument.name}: expected a dense tensor, got a {kind} tensor")
        raise AssertionError(f"{operator}: every tensor is dense")

    for name in OPERATORS:
        operator = getattr(torch.ops.qlora, name).default
        for key in _NOT_DENSE:
            LIBRARY.impl(name, lambda *args, operator=operator: refuse(operator, args), key)
        torch.library.register_torch_dispatch(
            f"qlora::{name}", NestedTensor, lambda cls, func, types, args, kwargs: refuse(func, args), lib=LIBRARY
        )


def _define_other_names() -> None:
    """Defines ``linear_4bit`` for ``linear_nf4`` and so on, which take every code; those that encode have 4 bits.

    Those that also take codes of more bits have a third name: ``linear_quantized`` and so on, and ``dequantize``.
    torch replaces such an operator by the first one before gradients, autocast and compilation see it.
    """
    for name in OPERATORS:
        if "nf4" not in name:
            continue
        operator = getattr(torch.ops.qlora, name).default
        _, _, signature = str(operator._schema).partition("(")
        aliases = [name.replace("nf4", "4bit")]
        if "linear" in name:
            aliases.append(name.replace("nf4", "quantized"))
        if name == "dequantize_nf4":
            aliases.append("dequantize")
        for alias in aliases:
            NAMES.define(f"{alias}({signature}")
            NAMES.impl(alias, operator, "CompositeImplicitAutograd")


_require_torch()
_load_cpu()
NAMES = torch.library.Library("qlora", "FRAGMENT")
LIBRARY = torch.library.Library("qlora", "IMPL")
cuda_error = _load_cuda()
if cuda_error is not None:
    _explain_on_cuda(cuda_error)
_explain_layouts()
_define_other_names()


_TEGRA = {(5, 3), (6, 2), (7, 2), (8, 7)}  # TX1, TX2, Xavier, Orin


def serves(archs: str, capability: tuple[int, int]) -> bool:
    """Whether kernels compiled for CMake's list ``archs`` ("80-real;90-virtual") run on a device of that capability.

    Machine code ("real") runs on devices of the same major version and the same or a later minor version, except
    between Tegra and other chips, which share none. PTX ("virtual") runs on all later devices. Architecture-specific
    code ("90a") runs on that architecture only.
    """

    def one(arch: str) -> bool:
        name, _, kind = arch.partition("-")
        number = int(name.rstrip("af"))
        built = divmod(number, 10)
        if name.endswith("a"):
            return built == capability
        if kind == "real" and built != capability and (built in _TEGRA or capability in _TEGRA):
            return False
        same_major = built[0] == capability[0] and built <= capability
        return same_major if kind == "real" or name.endswith("f") else built <= capability

    return any(one(arch) for arch in archs.split(";") if arch)


def cuda_is_usable() -> bool:
    """Whether there is a CUDA device, and kernels for CUDA."""
    return cuda_error is None and torch.cuda.is_available()


def _unsupported_device(archs: str) -> str | None:
    """Why the loaded kernels cannot run on the current device; None if they can, or if there is no device."""
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability()
    if serves(archs, capability):
        return None
    return f"the CUDA kernels here are for {archs}, this device has compute capability {capability[0]}.{capability[1]}"


def build_info() -> dict[str, Any]:
    """What this package was built with, and what it uses on this machine.

    Keys: ``version``, ``compiler``, ``torch_headers`` (version built against), ``torch`` (version in use),
    ``cuda_built``, ``cuda_archs`` (CMake's list), ``nvcc``, ``cuda_available`` (the kernels run on the current device),
    ``cuda_error`` (why there are no CUDA kernels, or None), ``cpu_isas_built`` (instruction sets that were compiled),
    ``cpu_isas`` (those that this processor runs, to choose from with the environment variable ``QLORA_CPU_ISA``),
    ``cpu_isa`` (in use) and ``native_bfloat16`` (whether the CPU has bfloat16 arithmetic; without it, ``auto``
    is float32, except for 4-bit layers whose products are integers: docs/benchmarks.md#the-automatic-dtype).

    Example:
        >>> qlora_ext.build_info()["version"] == qlora_ext.__version__
        True
    """
    built = _C.build_info()
    error = cuda_error or _unsupported_device(built["cuda_archs"])
    return {
        **built,
        "torch": torch.__version__,
        "cuda_error": error,
        "cuda_available": error is None and torch.cuda.is_available(),
        "cpu_isa": _C.cpu_isa(),
        "cpu_isas": _C.cpu_isas(),
        "native_bfloat16": native_bfloat16(),
    }
