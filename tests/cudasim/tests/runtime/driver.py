"""Kernels of PTX text on numpy arrays, through the driver's interface. It needs no PyTorch."""

from __future__ import annotations

import ctypes

import numpy as np

CUDART = ctypes.CDLL("libcudart.so.13")
CUDART.cudaGetErrorString.restype = ctypes.c_char_p
CUDA = ctypes.CDLL("libcuda.so.1")
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8


class CudaError(RuntimeError):
    def __init__(self, code: int) -> None:
        self.code = code
        super().__init__(CUDART.cudaGetErrorString(code).decode())


def check(code: int) -> None:
    if code:
        raise CudaError(code)


class Memory:
    """A copy of an array in device memory."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = np.ascontiguousarray(array)
        self.pointer = ctypes.c_void_p()
        check(CUDART.cudaMalloc(ctypes.byref(self.pointer), ctypes.c_size_t(self.array.nbytes)))
        source = ctypes.c_void_p(self.array.ctypes.data)
        check(CUDART.cudaMemcpy(self.pointer, source, ctypes.c_size_t(self.array.nbytes), HOST_TO_DEVICE))

    def read(self) -> np.ndarray:
        out = np.empty_like(self.array)
        target = ctypes.c_void_p(out.ctypes.data)
        check(CUDART.cudaMemcpy(target, self.pointer, ctypes.c_size_t(out.nbytes), DEVICE_TO_HOST))
        return out

    def __del__(self) -> None:
        CUDART.cudaFree(self.pointer)


class Module:
    """PTX text, or what nvcc writes with -fatbin."""

    def __init__(self, code: str | bytes) -> None:
        self.handle = ctypes.c_void_p()
        self.code = code.encode() if isinstance(code, str) else code  # whose memory a module of a fatbin refers to
        check(CUDA.cuModuleLoadData(ctypes.byref(self.handle), self.code))

    def function(self, name: str) -> ctypes.c_void_p:
        function = ctypes.c_void_p()
        check(CUDA.cuModuleGetFunction(ctypes.byref(function), self.handle, name.encode()))
        return function

    def launch(
        self,
        name: str,
        grid: tuple[int, int, int],
        threads: int,
        *arguments: Memory | ctypes._SimpleCData,
        shared: int = 0,
    ) -> None:
        function = self.function(name)
        if shared > 48 << 10:
            check(CUDA.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared))
        values = [a.pointer if isinstance(a, Memory) else a for a in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        check(CUDA.cuLaunchKernel(function, *grid, threads, 1, 1, shared, None, pointers, None))
