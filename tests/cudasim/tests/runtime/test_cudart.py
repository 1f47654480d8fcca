"""The runtime API itself."""

import ctypes
import os
import subprocess

import numpy as np
import pytest
import torch

if "libcudart" not in os.environ.get("LD_PRELOAD", ""):
    pytest.skip("not under the kernel simulator (tests/cudasim/cudasim)", allow_module_level=True)
from driver import Memory, Module

SUCCESS, INVALID_VALUE, NOT_SUPPORTED = 0, 1, 801
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2


@pytest.fixture(scope="module")
def cudart():
    lib = ctypes.CDLL("libcudart.so.13")
    lib.cudaGetErrorString.restype = ctypes.c_char_p
    return lib


def allocate(cudart, size):
    p = ctypes.c_void_p()
    assert cudart.cudaMalloc(ctypes.byref(p), ctypes.c_size_t(size)) == SUCCESS
    return p


def test_allocations_lie_far_apart(cudart):
    a, b = allocate(cudart, 100), allocate(cudart, 100)
    assert abs(a.value - b.value) >= 1 << 20
    assert cudart.cudaFree(a) == cudart.cudaFree(b) == SUCCESS


def test_copy_beyond_an_allocation(cudart):
    p, host = allocate(cudart, 100), ctypes.create_string_buffer(200)
    assert cudart.cudaMemcpy(p, host, ctypes.c_size_t(100), HOST_TO_DEVICE) == SUCCESS
    assert cudart.cudaMemcpy(p, host, ctypes.c_size_t(101), HOST_TO_DEVICE) == INVALID_VALUE
    assert b"101 bytes at offset 0 of an allocation of 100" in cudart.cudaGetErrorString(INVALID_VALUE)
    assert cudart.cudaGetLastError() == INVALID_VALUE
    assert cudart.cudaGetLastError() == SUCCESS
    cudart.cudaFree(p)
    assert cudart.cudaMemcpy(host, p, ctypes.c_size_t(100), DEVICE_TO_HOST) == INVALID_VALUE
    cudart.cudaGetLastError()


def test_double_free(cudart):
    p = allocate(cudart, 100)
    assert cudart.cudaFree(p) == SUCCESS
    assert cudart.cudaFree(p) == INVALID_VALUE
    cudart.cudaGetLastError()


def test_pointer_attributes(cudart):
    class Attributes(ctypes.Structure):
        _fields_ = [
            ("type", ctypes.c_int),
            ("device", ctypes.c_int),
            ("device_pointer", ctypes.c_void_p),
            ("host_pointer", ctypes.c_void_p),
            ("reserved", ctypes.c_long * 8),
        ]

    def kind(p):
        a = Attributes()
        assert cudart.cudaPointerGetAttributes(ctypes.byref(a), p) == SUCCESS
        return a.type

    device, pinned, plain = allocate(cudart, 8), ctypes.c_void_p(), ctypes.create_string_buffer(8)
    cudart.cudaHostAlloc(ctypes.byref(pinned), ctypes.c_size_t(8), 0)
    assert [kind(device), kind(ctypes.c_void_p(device.value + 7)), kind(pinned), kind(plain)] == [2, 2, 1, 0]
    assert kind(ctypes.c_void_p(device.value + 8)) == 0
    cudart.cudaFree(device)
    cudart.cudaFreeHost(pinned)


def test_what_is_not_simulated_says_so(cudart):
    graph = ctypes.c_void_p()
    assert cudart.cudaGraphCreate(ctypes.byref(graph), 0) == NOT_SUPPORTED


def test_attributes_of_older_ptx(cudart, tmp_path):
    source, fatbin = tmp_path / "k.cu", tmp_path / "k.fatbin"
    source.write_text('extern "C" __global__ void k(int* out) { *out = 7; }')
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    nvcc = ["nvcc", "-fatbin", "-gencode", "arch=compute_80,code=compute_80", source, "-o", fatbin]
    subprocess.run(nvcc, check=True, env=environment)
    module, out = Module(fatbin.read_bytes()), Memory(np.zeros(1, np.int32))
    module.launch("k", (1, 1, 1), 1, out)
    assert out.read().tolist() == [7]
    attributes = ctypes.create_string_buffer(256)
    assert cudart.cudaFuncGetAttributes(attributes, module.function("k")) == SUCCESS
    ptx_version, binary_version = np.frombuffer(attributes, np.int32, 2, offset=3 * 8 + 2 * 4)
    assert (ptx_version, binary_version) == (80, 90)


def test_tensor_maps(cudart):
    encode, status = ctypes.c_void_p(), ctypes.c_int()
    assert (
        cudart.cudaGetDriverEntryPointByVersion(
            b"cuTensorMapEncodeTiled", ctypes.byref(encode), 12000, ctypes.c_ulonglong(0), ctypes.byref(status)
        )
        == SUCCESS
    )
    function = ctypes.CFUNCTYPE(
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_uint32,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
    )(encode.value)
    x = torch.zeros(64, 128, device="cuda", dtype=torch.bfloat16)
    storage = ctypes.create_string_buffer(256)
    out = (ctypes.addressof(storage) + 63) // 64 * 64
    dims, strides = (ctypes.c_uint64 * 2)(128, 64), (ctypes.c_uint64 * 1)(256)
    box, steps = (ctypes.c_uint32 * 2)(64, 32), (ctypes.c_uint32 * 2)(1, 1)
    bf16, swizzle_128b = 9, 3
    assert function(out, bf16, 2, x.data_ptr(), dims, strides, box, steps, 0, swizzle_128b, 0, 0) == SUCCESS
    assert ctypes.c_uint64.from_address(out + 8).value == x.data_ptr()
    box[0] = 128  # 256 bytes, more than the swizzle spans
    assert function(out, bf16, 2, x.data_ptr(), dims, strides, box, steps, 0, swizzle_128b, 0, 0) == INVALID_VALUE
