from typing import Any

import numpy as np
from numpy.typing import NDArray

def build_info() -> dict[str, Any]: ...
def cpu_isas() -> list[str]: ...
def cpu_isa() -> str: ...
def choose(
    op: str,
    dtype: str,
    m: int,
    n: int,
    k: int,
    block_size: int = 64,
    isa: str | None = None,
    code: str = "nf4",
    device: str | dict[str, int] = "cpu",
    kernel: str = "",
    activations: str = "exact",
) -> list[str]: ...
def kernels(op: str) -> dict[str, list[str]]: ...
def codes() -> list[str]: ...
def wide_codes() -> dict[str, int]: ...
def code_values(code: str = "nf4") -> tuple[float, ...]: ...
def block_sizes() -> list[int]: ...

MAX_NESTED_BLOCK_SIZE: int
MAX_ELEMENTS: int

def dynamic8_code() -> NDArray[np.float32]: ...
def quantize_nf4(
    w: NDArray[np.float32], block_size: int = 64, code: str = "nf4"
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]: ...
def dequantize_nf4(
    packed: NDArray[np.uint8],
    absmax: NDArray[np.float32],
    numel: int,
    block_size: int = 64,
    code: str = "nf4",
    offsets: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]: ...
def quantize_absmax(
    absmax: NDArray[np.float32], nested_block_size: int = 256
) -> tuple[NDArray[np.uint8], NDArray[np.float32], float]: ...
def dequantize_absmax(
    codes: NDArray[np.uint8], nested_absmax: NDArray[np.float32], nested_offset: float, nested_block_size: int = 256
) -> NDArray[np.float32]: ...
