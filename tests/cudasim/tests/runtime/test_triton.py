"""A second opinion: kernels that we have not written, or not compiled, give what numpy gives.

Triton ships with PyTorch and compiles to PTX without a GPU. It chooses layouts, swizzles, pipelines and descriptors in
its own way. Its launcher is not simulated: the kernels run through the driver's interface. bitsandbytes embeds no PTX
in its libraries (`cuobjdump -lptx`), but has kernels in Triton, which run if it is installed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pathlib
import re
from typing import Any

import numpy as np
import pytest

import reference

if "libcudart" not in os.environ.get("LD_PRELOAD", ""):
    pytest.skip("not under the kernel simulator (tests/cudasim/cudasim)", allow_module_level=True)
triton = pytest.importorskip("triton", reason="this PyTorch came without Triton")

import triton.language as tl
from driver import Memory, Module
from simulator import simulate
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

WARPS = 4


@pytest.fixture(autouse=True)
def every_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDASIM_CHECK", "race,init,grid")  # each launch reads it


@triton.jit
def matmul(a, b, c, M, N, K, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr):
    m = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    k = tl.arange(0, TILE_K)
    total = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
    for i in range(0, K, TILE_K):
        x = tl.load(a + m[:, None] * K + i + k[None, :], mask=(m[:, None] < M) & (i + k[None, :] < K), other=0.0)
        y = tl.load(b + (i + k[:, None]) * N + n[None, :], mask=(n[None, :] < N) & (i + k[:, None] < K), other=0.0)
        total = tl.dot(x, y, total)
    tl.store(c + m[:, None] * N + n[None, :], total, mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def two_matmuls(a, b, c, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, P: tl.constexpr):
    m, n, k, p = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K), tl.arange(0, P)
    x = tl.load(a + m[:, None] * K + k[None, :])
    y = tl.load(b + k[:, None] * N + n[None, :])
    z = tl.load(c + n[:, None] * P + p[None, :])
    tl.store(out + m[:, None] * P + p[None, :], tl.dot(tl.maximum(tl.dot(x, y), 0.0).to(tl.float16), z))


@triton.jit
def softmax(x, out, columns, TILE: tl.constexpr):
    at = tl.arange(0, TILE)
    row = tl.load(x + tl.program_id(0) * columns + at, mask=at < columns, other=-float("inf"))
    e = tl.exp(row - tl.max(row, axis=0))
    tl.store(out + tl.program_id(0) * columns + at, e / tl.sum(e, axis=0), mask=at < columns)


@triton.jit
def running_sums(x, out, n, counts, TILE: tl.constexpr):
    at = tl.arange(0, TILE)
    values = tl.load(x + at, mask=at < n, other=0)
    tl.store(out + at, tl.cumsum(values, 0), mask=at < n)
    tl.atomic_add(counts + values, 1, mask=at < n)


def run(kernel: Any, arch: int, grid: tuple[int, int], *arguments: Memory | int, **constants: int) -> str:
    """Compiles the kernel for `sm_arch` and launches it. Returns its PTX."""
    types = {np.uint16: "*bf16", np.float16: "*fp16", np.float32: "*fp32", np.int32: "*i32", np.uint8: "*u8"}
    kinds = [types[a.array.dtype.type] if isinstance(a, Memory) else "i32" for a in arguments]
    names = kernel.arg_names[: len(kinds)]
    signature = dict(zip(names, kinds, strict=True)) | dict.fromkeys(constants, "constexpr")
    aligned = [i for i, a in enumerate(arguments) if isinstance(a, Memory) or a % 16 == 0]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": WARPS})
    values = [a if isinstance(a, Memory) else ctypes.c_int32(a) for a in arguments]
    scratch = [ctypes.c_void_p(), ctypes.c_void_p()]  # Triton's own last parameters, which these kernels do not use
    Module(compiled.asm["ptx"]).launch(
        compiled.metadata.name, (*grid, 1), 32 * WARPS, *values, *scratch, shared=compiled.metadata.shared
    )
    return compiled.asm["ptx"]


def bfloat16(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The upper halves of float32, and their values."""
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32)


def check_matmul(arch: int, instruction: str, tile: tuple[int, int, int]) -> None:
    rng, (m, n, k) = np.random.default_rng(1), (80, 144, 112)
    (a, x), (b, y) = (bfloat16(rng.standard_normal(s).astype(np.float32)) for s in ((m, k), (k, n)))
    c = Memory(np.zeros((m, n), np.float32))
    grid = (-(-m // tile[0]), -(-n // tile[1]))
    tiles = dict(zip(("TILE_M", "TILE_N", "TILE_K"), tile, strict=True))
    ptx = run(matmul, arch, grid, Memory(a), Memory(b), c, m, n, k, **tiles)
    assert instruction in ptx
    np.testing.assert_allclose(c.read(), x @ y, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("arch", "instruction"), [(80, "mma.sync"), (90, "wgmma.mma_async")])
def test_matmul(arch: int, instruction: str) -> None:
    check_matmul(arch, instruction, (64, 64, 32))


def check_two_matmuls(m: int) -> None:
    """The second takes its first operand from tensor memory."""
    rng, n, k, p = np.random.default_rng(5), 64, 64, 32
    a, b, c = (rng.standard_normal(s).astype(np.float16) for s in ((m, k), (k, n), (n, p)))
    out = Memory(np.zeros((m, p), np.float32))
    ptx = run(two_matmuls, 100, (1, 1), Memory(a), Memory(b), Memory(c), out, M=m, N=n, K=k, P=p)
    assert re.search(r"tcgen05\.mma\S* \[[^]]*\], \[", ptx)
    between = np.maximum(a.astype(np.float32) @ b.astype(np.float32), 0).astype(np.float16)
    np.testing.assert_allclose(out.read(), between.astype(np.float32) @ c.astype(np.float32), rtol=0, atol=1e-3)


def test_tensor_memory() -> None:
    # Triton emits no tcgen05.fence, which only `--check fence` reports.
    result = simulate(["--arch", "100", "--check", "race,init,grid"], ["test_triton.py"])
    assert result.returncode == 0, result.stderr


def test_softmax() -> None:
    x = np.random.default_rng(2).standard_normal((5, 800)).astype(np.float32)
    out = Memory(np.zeros_like(x))
    run(softmax, 80, (5, 1), Memory(x), out, x.shape[1], TILE=1024)
    e = np.exp(x - x.max(1, keepdims=True))
    np.testing.assert_allclose(out.read(), e / e.sum(1, keepdims=True), rtol=1e-5)


def test_running_sums_and_atomics() -> None:
    x = np.random.default_rng(3).integers(0, 10, 900, np.int32)
    out, counts = Memory(np.zeros_like(x)), Memory(np.zeros(16, np.int32))
    run(running_sums, 80, (1, 1), Memory(x), out, len(x), counts, TILE=1024)
    np.testing.assert_array_equal(out.read(), np.cumsum(x, dtype=np.int32))
    np.testing.assert_array_equal(counts.read(), np.bincount(x, minlength=16))


@pytest.fixture(scope="module")
def bitsandbytes() -> Any:
    spec = importlib.util.find_spec("bitsandbytes")
    if spec is None or spec.origin is None:
        pytest.skip("bitsandbytes is not installed")
    path = pathlib.Path(spec.origin).parent / "backends" / "triton" / "kernels_4bit.py"
    kernels = importlib.util.spec_from_file_location("bitsandbytes_kernels_4bit", path)
    assert kernels is not None
    assert kernels.loader is not None
    module = importlib.util.module_from_spec(kernels)
    kernels.loader.exec_module(module)
    return module


def test_bitsandbytes_quantizes_to_nf4_and_back(bitsandbytes: Any) -> None:
    rng, block, blocks = np.random.default_rng(4), 64, 24
    x = rng.standard_normal(block * blocks).astype(np.float32)
    packed, absmax = reference.quantize_nf4(x, block)
    got_absmax, got = Memory(np.zeros(blocks, np.float32)), Memory(np.zeros(len(x) // 2, np.uint8))
    run(
        bitsandbytes.quantize_nf4_blockwise_kernel,
        *(80, (blocks // 8, 1), Memory(x), got_absmax, got, len(x), blocks),
        **{"BLOCK_SIZE": block, "SPLIT_NUM_BLOCKS": 4},
    )
    np.testing.assert_array_equal(got_absmax.read(), absmax)
    np.testing.assert_array_equal(got.read(), packed)

    back = Memory(np.zeros_like(x))
    run(
        bitsandbytes.dequant_nf4_kernel,
        *(80, (len(packed) // 256, 1), Memory(packed), back, Memory(absmax), len(packed), len(x)),
        **{"QUANT_BLOCK": block, "SPLIT_SIZE": 256},
    )
    np.testing.assert_array_equal(back.read(), reference.dequantize_nf4(packed, absmax, len(x), block))


if __name__ == "__main__":  # on a simulated B200
    for tile in ((64, 64, 32), (128, 64, 64), (128, 128, 64)):
        check_matmul(100, "tcgen05.mma", tile)
    for rows in (64, 128):
        check_two_matmuls(rows)
