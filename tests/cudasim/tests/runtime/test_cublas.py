"""cuBLAS as an extension calls it (PyTorch's own products do not come here)."""

import ctypes

import pytest
import torch

N, T = 0, 1
TYPES = {torch.float32: 0, torch.half: 2, torch.bfloat16: 14, torch.int8: 3, torch.int32: 10}
COMPUTE_32F, COMPUTE_32I = 68, 72


@pytest.fixture(scope="module")
def blas():
    return ctypes.CDLL("libcublas.so.13")


@pytest.fixture(scope="module")
def lt():
    return ctypes.CDLL("libcublasLt.so.13")


@pytest.fixture(scope="module")
def handle(blas):
    h = ctypes.c_void_p()
    assert blas.cublasCreate_v2(ctypes.byref(h)) == 0
    return h


def pointer(t):
    return ctypes.c_void_p(t.data_ptr())


def by_columns(matrix, op):
    """The matrix as the operand `op` of a column-major library: its data and leading dimension."""
    stored = matrix if op == T else matrix.t()
    stored = stored.contiguous().cuda()
    return stored, stored.shape[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.half, torch.bfloat16])
@pytest.mark.parametrize("op_a", [N, T])
@pytest.mark.parametrize("op_b", [N, T])
def test_gemm_ex(blas, handle, dtype, op_a, op_b):
    m, n, k = 33, 45, 70
    a, b, c = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), torch.randn(m, n).to(dtype)
    (da, lda), (db, ldb), (dc, ldc) = by_columns(a, op_a), by_columns(b, op_b), by_columns(c, N)
    alpha, beta, code = ctypes.c_float(0.5), ctypes.c_float(2), TYPES[dtype]
    status = blas.cublasGemmEx(
        handle,
        op_a,
        op_b,
        m,
        n,
        k,
        ctypes.byref(alpha),
        pointer(da),
        code,
        lda,
        pointer(db),
        code,
        ldb,
        ctypes.byref(beta),
        pointer(dc),
        code,
        ldc,
        COMPUTE_32F,
        -1,
    )
    assert status == 0
    torch.testing.assert_close(
        dc.t().cpu(), (0.5 * (a.float() @ b.float()) + 2 * c.float()).to(dtype), rtol=1e-2, atol=1e-2
    )


def test_strided_batches(blas, handle):
    a, b = torch.randn(3, 4, 5, device="cuda"), torch.randn(3, 5, 6, device="cuda")
    c = torch.zeros(3, 4, 6, device="cuda")
    one, zero = ctypes.c_float(1), ctypes.c_float(0)
    ll = ctypes.c_longlong
    # By rows, c = a b is by columns c' = b' a'.
    status = blas.cublasSgemmStridedBatched(
        handle,
        N,
        N,
        6,
        4,
        5,
        ctypes.byref(one),
        pointer(b),
        6,
        ll(30),
        pointer(a),
        5,
        ll(20),
        ctypes.byref(zero),
        pointer(c),
        6,
        ll(24),
        3,
    )
    assert status == 0
    torch.testing.assert_close(c, a @ b)


def test_out_of_bounds_operand_is_refused(blas, handle, capfd):
    a = torch.ones(10, 10, device="cuda")
    c = torch.ones(10, 10, device="cuda")
    one = ctypes.c_float(1)
    status = blas.cublasSgemm_v2(
        handle, N, N, 10, 10, 11, ctypes.byref(one), pointer(a), 10, pointer(a), 11, ctypes.byref(one), pointer(c), 10
    )
    assert status != 0
    assert "matrix A" in capfd.readouterr().err


def lt_multiply(lt, a, b, out, compute, scale, bias=None, epilogue=None):
    """out (m x n, by rows) = a (m x k) b (k x n) + bias (m), through row-major layouts."""

    def layout(t):
        result = ctypes.c_void_p()
        lt.cublasLtMatrixLayoutCreate(
            ctypes.byref(result),
            TYPES[t.dtype],
            ctypes.c_uint64(t.shape[0]),
            ctypes.c_uint64(t.shape[1]),
            ctypes.c_int64(t.stride(0)),
        )
        order = ctypes.c_int32(1)
        assert lt.cublasLtMatrixLayoutSetAttribute(result, 1, ctypes.byref(order), ctypes.c_size_t(4)) == 0
        return result

    handle, description = ctypes.c_void_p(), ctypes.c_void_p()
    lt.cublasLtCreate(ctypes.byref(handle))
    lt.cublasLtMatmulDescCreate(ctypes.byref(description), compute, TYPES[scale])
    if epilogue:
        value, address = ctypes.c_uint32(epilogue), pointer(bias)
        lt.cublasLtMatmulDescSetAttribute(description, 7, ctypes.byref(value), ctypes.c_size_t(4))
        lt.cublasLtMatmulDescSetAttribute(description, 8, ctypes.byref(address), ctypes.c_size_t(8))
    number = ctypes.c_int32 if scale == torch.int32 else ctypes.c_float
    one, zero = number(1), number(0)
    return lt.cublasLtMatmul(
        handle,
        description,
        ctypes.byref(one),
        pointer(a),
        layout(a),
        pointer(b),
        layout(b),
        ctypes.byref(zero),
        pointer(out),
        layout(out),
        pointer(out),
        layout(out),
        None,
        None,
        ctypes.c_size_t(0),
        None,
    )


def test_lt_matmul_with_bias_and_relu(lt):
    a, b, bias = torch.randn(8, 16).bfloat16(), torch.randn(16, 4).bfloat16(), torch.randn(8).bfloat16()
    out = torch.empty(8, 4, device="cuda", dtype=torch.bfloat16)
    assert lt_multiply(lt, a.cuda(), b.cuda(), out, COMPUTE_32F, torch.float32, bias.cuda(), epilogue=6) == 0
    expected = torch.relu(a.float() @ b.float() + bias.float()[:, None]).bfloat16()
    torch.testing.assert_close(out.cpu(), expected)


def test_lt_matmul_of_int8(lt):
    a, b = (torch.randint(-128, 128, s, dtype=torch.int8) for s in ((8, 32), (32, 4)))
    out = torch.empty(8, 4, device="cuda", dtype=torch.int32)
    assert lt_multiply(lt, a.cuda(), b.cuda(), out, COMPUTE_32I, torch.int32) == 0
    assert torch.equal(out.cpu(), a.int() @ b.int())


def test_in_a_graph(blas, handle):
    a, b, c = torch.randn(4, 5, device="cuda"), torch.randn(5, 3, device="cuda"), torch.zeros(4, 3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        blas.cublasSetStream_v2(handle, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
        one, zero = ctypes.c_float(1), ctypes.c_float(0)  # c' = b' a' by columns
        assert (
            blas.cublasSgemm_v2(
                handle,
                N,
                N,
                3,
                4,
                5,
                ctypes.byref(one),
                pointer(b),
                3,
                pointer(a),
                5,
                ctypes.byref(zero),
                pointer(c),
                3,
            )
            == 0
        )
        one.value = 7  # taken by value
    blas.cublasSetStream_v2(handle, None)
    assert c.eq(0).all()
    graph.replay()
    torch.testing.assert_close(c, a @ b)
