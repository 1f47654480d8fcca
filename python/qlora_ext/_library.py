"""Loads the compiled operators into torch, and knows what was loaded."""

from __future__ import annotations

import ctypes
import pathlib
import sys
from typing import Any

import torch

from . import _C
from .dtypes import native_bfloat16

OPERATORS = (
    "quantize_nf4",
    "search_absmax_nf4",
    "encode_nf4",
    "encode_nf4_stochastic",
    "quantize_absmax",
    "dequantize_absmax",
    "dequantize_nf4",
    "linear_nf4",
    "linear_nf4_with_h",
    "linear_nf4_dx",
    "linear_nf4_dx_with_g",
    "linear_nf4_dlora",
    "grouped_linear_nf4",
    "grouped_linear_nf4_with_h",
    "grouped_linear_nf4_dx",
    "grouped_linear_nf4_dx_with_g",
    "grouped_linear_nf4_dlora",
)


def _find(name: str) -> str | None:
    suffix = ".dll" if sys.platform == "win32" else ".so"  # on macOS, too, for what is loaded by its path
    # Beside _C, not beside this file: the package has two directories in an editable install.
    library = pathlib.Path(_C.__file__).with_name(name + suffix)
    return str(library) if library.is_file() else None


def _require_torch() -> None:
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) < (2, 11):
        raise ImportError(f"qlora_ext needs torch 2.11 or newer, found {torch.__version__}: pip install -U torch")


def _load_cpu() -> None:
    _C.cpu_isa()  # refuses a QLORA_CPU_ISA that cannot be honoured, before anything runs
    library = _find("libqlora_cpu")
    if library is None:
        raise ImportError("qlora_ext: libqlora_cpu is missing beside _C; reinstall the package")
    torch.ops.load_library(library)


def link_compiled_code() -> None:
    """Lets code that AOTInductor compiles, or has compiled, call what cpp/ops/c_shims.cpp defines."""
    ctypes.CDLL(_find("libqlora_cpu"), ctypes.RTLD_GLOBAL)  # loaded already, and until now for nobody else


def _load_cuda() -> str | None:
    """Why there are no CUDA kernels here; None where they were loaded."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    library = _find("libqlora_cuda")
    if library is None:
        return "qlora_ext was built without nvcc"
    try:
        torch.ops.load_library(library)
    except OSError as error:  # another CUDA major than the one built for: libcudart.so.NN
        return str(error.__cause__ or error)
    return None


def _explain_on_cuda(reason: str) -> None:
    """A CUDA tensor meets the reason, not torch's list of the backends that an operator does have."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"qlora_ext has no CUDA kernels here: {reason}")

    for name in OPERATORS:
        LIBRARY.impl(name, refuse, "CUDA")


_require_torch()
_load_cpu()
LIBRARY = torch.library.Library("qlora", "IMPL")
cuda_error = _load_cuda()
if cuda_error is not None:
    _explain_on_cuda(cuda_error)


def serves(archs: str, capability: tuple[int, int]) -> bool:
    """Whether kernels compiled for CMake's list ``archs`` ("80-real;90-virtual") run on a device of that capability.

    Machine code runs on later devices of its major version, PTX on all later ones, and code for an architecture's own
    features ("90a") on that one alone.
    """

    def one(arch: str) -> bool:
        name, _, kind = arch.partition("-")
        number = int(name.rstrip("af"))
        built = divmod(number, 10)
        if name.endswith("a"):
            return built == capability
        same_major = built[0] == capability[0] and built <= capability
        return same_major if kind == "real" or name.endswith("f") else built <= capability

    return any(one(arch) for arch in archs.split(";") if arch)


def _why_not_here(archs: str) -> str | None:
    """Why the kernels that were loaded do not run on the current device; None where they do, or there is none."""
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability()
    if serves(archs, capability):
        return None
    return f"the CUDA kernels here are for {archs}, this device has compute capability {capability[0]}.{capability[1]}"


def build_info() -> dict[str, Any]:
    """What this package is: version, compilers, torch headers, CUDA architectures, and what it runs with here.

    Keys: ``version``, ``compiler``, ``torch_headers`` (version built against), ``torch`` (version in use),
    ``cuda_built``, ``cuda_archs`` (CMake's list), ``nvcc``, ``cuda_available`` (the kernels run on the current device),
    ``cuda_error`` (why there are no CUDA kernels, or None), ``cpu_isas_built`` (instruction sets that were compiled),
    ``cpu_isas`` (those that this processor runs, to choose from with the environment variable ``QLORA_CPU_ISA``),
    ``cpu_isa`` (in use) and ``native_bfloat16`` (whether the CPU has bfloat16 arithmetic; without it, ``auto`` dtypes
    are float32).

    Example:
        >>> qlora_ext.build_info()["version"] == qlora_ext.__version__
        True
    """
    built = _C.build_info()
    error = cuda_error or _why_not_here(built["cuda_archs"])
    return {
        **built,
        "torch": torch.__version__,
        "cuda_error": error,
        "cuda_available": error is None and torch.cuda.is_available(),
        "cpu_isa": _C.cpu_isa(),
        "cpu_isas": _C.cpu_isas(),
        "native_bfloat16": native_bfloat16(),
    }
