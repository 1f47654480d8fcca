// The part of cuBLAS that is simulated: handles, real matrix products and a few vector operations.
#include <cuda_runtime_api.h>

#include <cmath>

#include "gemm.h"

using namespace cudasim::blas;

#define API extern "C" __attribute__((visibility("default")))

namespace {

struct Handle {
  cudaStream_t stream = nullptr;
  int math_mode = 0, pointer_mode = 0, atomics_mode = 0, sm_target = 0;
};

constexpr int kVersion = 130100;
constexpr int kTf32MathMode = 3;

// Transposition and conjugation are the same for real numbers.
Matrix operand(int op, const void* data, cudaDataType type, int64_t ld, int64_t stride = 0) {
  return {.data = const_cast<void*>(data), .type = type, .ld = ld, .batch_stride = stride, .transposed = op != 0};
}

template <class T>
constexpr cudaDataType type_of();
template <>
constexpr cudaDataType type_of<float>() {
  return CUDA_R_32F;
}
template <>
constexpr cudaDataType type_of<double>() {
  return CUDA_R_64F;
}
template <>
constexpr cudaDataType type_of<uint16_t>() {
  return CUDA_R_16F;
}
template <class T>
constexpr int compute_of() {
  return type_of<T>() == CUDA_R_64F ? compute_64f : type_of<T>() == CUDA_R_16F ? compute_16f : compute_32f;
}

int multiply(const char* caller, void* handle, int op_a, int op_b, int64_t m, int64_t n, int64_t k, const void* alpha,
             const void* a, cudaDataType a_type, int64_t lda, int64_t stride_a, const void* b, cudaDataType b_type,
             int64_t ldb, int64_t stride_b, const void* beta, void* c, cudaDataType c_type, int64_t ldc,
             int64_t stride_c, int64_t batch, int compute) {
  if (!handle) return not_initialized;
  if (compute == compute_32f && a_type == CUDA_R_32F && static_cast<Handle*>(handle)->math_mode == kTf32MathMode)
    compute = compute_32f_fast_tf32;
  Gemm g;
  g.caller = caller;
  g.m = m, g.n = n, g.k = k, g.batch = batch;
  g.a = operand(op_a, a, a_type, lda, stride_a);
  g.b = operand(op_b, b, b_type, ldb, stride_b);
  g.c = g.d = operand(0, c, c_type, ldc, stride_c);
  g.alpha = alpha, g.beta = beta;
  g.compute = compute;
  g.scale_type = scale_type_of(compute);
  g.stream = static_cast<Handle*>(handle)->stream;
  return submit(g);
}

int multiply_pointers(const char* caller, void* handle, int op_a, int op_b, int64_t m, int64_t n, int64_t k,
                      const void* alpha, void* const* a, cudaDataType a_type, int64_t lda, void* const* b,
                      cudaDataType b_type, int64_t ldb, const void* beta, void* const* c, cudaDataType c_type,
                      int64_t ldc, int64_t batch, int compute) {
  if (!handle) return not_initialized;
  Gemm g;
  g.caller = caller;
  g.m = m, g.n = n, g.k = k, g.batch = batch;
  g.a = operand(op_a, nullptr, a_type, lda);
  g.b = operand(op_b, nullptr, b_type, ldb);
  g.c = g.d = operand(0, nullptr, c_type, ldc);
  g.a.pointers = a, g.b.pointers = b, g.c.pointers = g.d.pointers = c;
  g.alpha = alpha, g.beta = beta;
  g.compute = compute;
  g.scale_type = scale_type_of(compute);
  g.stream = static_cast<Handle*>(handle)->stream;
  return submit(g);
}

// y = alpha * op(A) * x + beta * y, A being m x n. Negative increments are not simulated.
template <class T>
int matrix_vector(void* handle, int op, int64_t m, int64_t n, const T* alpha, const T* a, int64_t lda, const T* x,
                  int64_t incx, const T* beta, T* y, int64_t incy) {
  if (!handle) return not_initialized;
  if (incx <= 0 || incy <= 0) return not_supported;
  Gemm g;
  g.caller = "cublas gemv";
  g.m = op ? n : m, g.n = 1, g.k = op ? m : n;
  g.a = operand(op, a, type_of<T>(), lda);
  g.b = operand(0, x, type_of<T>(), incx);
  g.c = g.d = operand(0, y, type_of<T>(), incy);
  g.b.row_major = g.c.row_major = g.d.row_major = true;  // a column with gaps
  g.alpha = alpha, g.beta = beta;
  g.compute = compute_of<T>();
  g.scale_type = type_of<T>();
  g.stream = static_cast<Handle*>(handle)->stream;
  return submit(g);
}

// The functions below execute immediately, so they cannot be part of a graph.
bool refused(void* handle) {
  const cudaStream_t stream = handle ? static_cast<Handle*>(handle)->stream : nullptr;
  if (!cudasim_begin_work(stream)) return false;
  cudasim_refuse_capture(stream, "a cuBLAS vector function, which is not recorded in graphs");
  return true;
}

double dot(int64_t n, const void* x, cudaDataType x_type, int64_t incx, const void* y, cudaDataType y_type,
           int64_t incy) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += load(x, i * incx, x_type) * load(y, i * incy, y_type);
  return sum;
}

}  // namespace

// ---- handles
API int cublasCreate_v2(void** handle) {
  *handle = new Handle;
  return success;
}
API int cublasDestroy_v2(void* handle) {
  delete static_cast<Handle*>(handle);
  return success;
}
API int cublasGetVersion_v2(void*, int* version) {
  *version = kVersion;
  return success;
}
API int cublasGetProperty(int property, int* value) {
  *value = property == 0 ? kVersion / 10000 : property == 1 ? kVersion / 100 % 100 : kVersion % 100;
  return success;
}
API size_t cublasGetCudartVersion() { return CUDART_VERSION; }
API int cublasSetStream_v2(void* handle, cudaStream_t stream) {
  static_cast<Handle*>(handle)->stream = stream;
  return success;
}
API int cublasGetStream_v2(void* handle, cudaStream_t* stream) {
  *stream = static_cast<Handle*>(handle)->stream;
  return success;
}
API int cublasSetWorkspace_v2(void*, void*, size_t) { return success; }
#define MODE(Name, field)                             \
  API int cublasSet##Name(void* handle, int value) {  \
    static_cast<Handle*>(handle)->field = value;      \
    return success;                                   \
  }                                                   \
  API int cublasGet##Name(void* handle, int* value) { \
    *value = static_cast<Handle*>(handle)->field;     \
    return success;                                   \
  }
MODE(MathMode, math_mode);
MODE(PointerMode_v2, pointer_mode);
MODE(AtomicsMode, atomics_mode);
MODE(SmCountTarget, sm_target);
#undef MODE
API int cublasLoggerConfigure(int, int, int, const char*) { return success; }
API const char* cublasGetStatusName(int status) {
  switch (status) {
    case success:
      return "CUBLAS_STATUS_SUCCESS";
    case not_initialized:
      return "CUBLAS_STATUS_NOT_INITIALIZED";
    case invalid_value:
      return "CUBLAS_STATUS_INVALID_VALUE";
    case execution_failed:
      return "CUBLAS_STATUS_EXECUTION_FAILED";
    case not_supported:
      return "CUBLAS_STATUS_NOT_SUPPORTED";
    default:
      return "CUBLAS_STATUS_INTERNAL_ERROR";
  }
}
API const char* cublasGetStatusString(int status) { return cublasGetStatusName(status); }

// ---- copies between host and device
API int cublasSetVector(int n, int size, const void* x, int incx, void* y, int incy) {
  return cudaMemcpy2D(y, static_cast<size_t>(incy) * size, x, static_cast<size_t>(incx) * size, size, n,
                      cudaMemcpyHostToDevice)
             ? execution_failed
             : success;
}
API int cublasGetVector(int n, int size, const void* x, int incx, void* y, int incy) {
  return cudaMemcpy2D(y, static_cast<size_t>(incy) * size, x, static_cast<size_t>(incx) * size, size, n,
                      cudaMemcpyDeviceToHost)
             ? execution_failed
             : success;
}
API int cublasSetMatrix(int rows, int cols, int size, const void* a, int lda, void* b, int ldb) {
  return cudaMemcpy2D(b, static_cast<size_t>(ldb) * size, a, static_cast<size_t>(lda) * size,
                      static_cast<size_t>(rows) * size, cols, cudaMemcpyHostToDevice)
             ? execution_failed
             : success;
}
API int cublasGetMatrix(int rows, int cols, int size, const void* a, int lda, void* b, int ldb) {
  return cudaMemcpy2D(b, static_cast<size_t>(ldb) * size, a, static_cast<size_t>(lda) * size,
                      static_cast<size_t>(rows) * size, cols, cudaMemcpyDeviceToHost)
             ? execution_failed
             : success;
}

// ---- products, with 32- and 64-bit sizes
#define GEMM(Name, T, Suffix, Int)                                                                                   \
  API int cublas##Name##gemm##Suffix(void* h, int ta, int tb, Int m, Int n, Int k, const T* alpha, const T* a,       \
                                     Int lda, const T* b, Int ldb, const T* beta, T* c, Int ldc) {                   \
    return multiply("cublas" #Name "gemm", h, ta, tb, m, n, k, alpha, a, type_of<T>(), lda, 0, b, type_of<T>(), ldb, \
                    0, beta, c, type_of<T>(), ldc, 0, 1, compute_of<T>());                                           \
  }
GEMM(S, float, _v2, int);
GEMM(S, float, _v2_64, int64_t);
GEMM(D, double, _v2, int);
GEMM(D, double, _v2_64, int64_t);
GEMM(H, uint16_t, , int);
GEMM(H, uint16_t, _64, int64_t);
#undef GEMM

#define GEMM_STRIDED(Name, T, Suffix, Int)                                                                         \
  API int cublas##Name##gemmStridedBatched##Suffix(                                                                \
      void* h, int ta, int tb, Int m, Int n, Int k, const T* alpha, const T* a, Int lda, long long sa, const T* b, \
      Int ldb, long long sb, const T* beta, T* c, Int ldc, long long sc, Int batch) {                              \
    return multiply("cublas" #Name "gemmStridedBatched", h, ta, tb, m, n, k, alpha, a, type_of<T>(), lda, sa, b,   \
                    type_of<T>(), ldb, sb, beta, c, type_of<T>(), ldc, sc, batch, compute_of<T>());                \
  }
GEMM_STRIDED(S, float, , int);
GEMM_STRIDED(S, float, _64, int64_t);
GEMM_STRIDED(D, double, , int);
GEMM_STRIDED(D, double, _64, int64_t);
GEMM_STRIDED(H, uint16_t, , int);
GEMM_STRIDED(H, uint16_t, _64, int64_t);
#undef GEMM_STRIDED

#define GEMM_BATCHED(Name, T, Suffix, Int)                                                                     \
  API int cublas##Name##gemmBatched##Suffix(void* h, int ta, int tb, Int m, Int n, Int k, const T* alpha,      \
                                            void* const* a, Int lda, void* const* b, Int ldb, const T* beta,   \
                                            void* const* c, Int ldc, Int batch) {                              \
    return multiply_pointers("cublas" #Name "gemmBatched", h, ta, tb, m, n, k, alpha, a, type_of<T>(), lda, b, \
                             type_of<T>(), ldb, beta, c, type_of<T>(), ldc, batch, compute_of<T>());           \
  }
GEMM_BATCHED(S, float, , int);
GEMM_BATCHED(S, float, _64, int64_t);
GEMM_BATCHED(D, double, , int);
GEMM_BATCHED(D, double, _64, int64_t);
GEMM_BATCHED(H, uint16_t, , int);
GEMM_BATCHED(H, uint16_t, _64, int64_t);
#undef GEMM_BATCHED

#define GEMM_EX(Suffix, Int)                                                                                           \
  API int cublasGemmEx##Suffix(void* h, int ta, int tb, Int m, Int n, Int k, const void* alpha, const void* a,         \
                               cudaDataType at, Int lda, const void* b, cudaDataType bt, Int ldb, const void* beta,    \
                               void* c, cudaDataType ct, Int ldc, int compute, int) {                                  \
    return multiply("cublasGemmEx", h, ta, tb, m, n, k, alpha, a, at, lda, 0, b, bt, ldb, 0, beta, c, ct, ldc, 0, 1,   \
                    compute);                                                                                          \
  }                                                                                                                    \
  API int cublasGemmStridedBatchedEx##Suffix(void* h, int ta, int tb, Int m, Int n, Int k, const void* alpha,          \
                                             const void* a, cudaDataType at, Int lda, long long sa, const void* b,     \
                                             cudaDataType bt, Int ldb, long long sb, const void* beta, void* c,        \
                                             cudaDataType ct, Int ldc, long long sc, Int batch, int compute, int) {    \
    return multiply("cublasGemmStridedBatchedEx", h, ta, tb, m, n, k, alpha, a, at, lda, sa, b, bt, ldb, sb, beta, c,  \
                    ct, ldc, sc, batch, compute);                                                                      \
  }                                                                                                                    \
  API int cublasGemmBatchedEx##Suffix(void* h, int ta, int tb, Int m, Int n, Int k, const void* alpha, void* const* a, \
                                      cudaDataType at, Int lda, void* const* b, cudaDataType bt, Int ldb,              \
                                      const void* beta, void* const* c, cudaDataType ct, Int ldc, Int batch,           \
                                      int compute, int) {                                                              \
    return multiply_pointers("cublasGemmBatchedEx", h, ta, tb, m, n, k, alpha, a, at, lda, b, bt, ldb, beta, c, ct,    \
                             ldc, batch, compute);                                                                     \
  }                                                                                                                    \
  API int cublasSgemmEx##Suffix(void* h, int ta, int tb, Int m, Int n, Int k, const float* alpha, const void* a,       \
                                cudaDataType at, Int lda, const void* b, cudaDataType bt, Int ldb, const float* beta,  \
                                void* c, cudaDataType ct, Int ldc) {                                                   \
    return multiply("cublasSgemmEx", h, ta, tb, m, n, k, alpha, a, at, lda, 0, b, bt, ldb, 0, beta, c, ct, ldc, 0, 1,  \
                    compute_32f);                                                                                      \
  }
GEMM_EX(, int);
GEMM_EX(_64, int64_t);
#undef GEMM_EX

API int cublasSgemv_v2(void* h, int op, int m, int n, const float* alpha, const float* a, int lda, const float* x,
                       int incx, const float* beta, float* y, int incy) {
  return matrix_vector(h, op, m, n, alpha, a, lda, x, incx, beta, y, incy);
}
API int cublasDgemv_v2(void* h, int op, int m, int n, const double* alpha, const double* a, int lda, const double* x,
                       int incx, const double* beta, double* y, int incy) {
  return matrix_vector(h, op, m, n, alpha, a, lda, x, incx, beta, y, incy);
}

// ---- vectors
API int cublasSdot_v2(void* h, int n, const float* x, int incx, const float* y, int incy, float* result) {
  if (refused(h)) return not_supported;
  *result = static_cast<float>(dot(n, x, CUDA_R_32F, incx, y, CUDA_R_32F, incy));
  return success;
}
API int cublasDdot_v2(void* h, int n, const double* x, int incx, const double* y, int incy, double* result) {
  if (refused(h)) return not_supported;
  *result = dot(n, x, CUDA_R_64F, incx, y, CUDA_R_64F, incy);
  return success;
}
API int cublasDotEx(void* h, int n, const void* x, cudaDataType xt, int incx, const void* y, cudaDataType yt, int incy,
                    void* result, cudaDataType rt, cudaDataType) {
  if (refused(h)) return not_supported;
  if (!size_of(xt) || !size_of(yt) || !size_of(rt)) return not_supported;
  store(result, 0, rt, dot(n, x, xt, incx, y, yt, incy));
  return success;
}
API int cublasSaxpy_v2(void* h, int n, const float* alpha, const float* x, int incx, float* y, int incy) {
  if (refused(h)) return not_supported;
  for (int64_t i = 0; i < n; ++i) y[i * incy] += *alpha * x[i * incx];
  return success;
}
API int cublasSscal_v2(void* h, int n, const float* alpha, float* x, int incx) {
  if (refused(h)) return not_supported;
  for (int64_t i = 0; i < n; ++i) x[i * incx] *= *alpha;
  return success;
}
API int cublasSnrm2_v2(void* h, int n, const float* x, int incx, float* result) {
  if (refused(h)) return not_supported;
  *result = static_cast<float>(std::sqrt(dot(n, x, CUDA_R_32F, incx, x, CUDA_R_32F, incx)));
  return success;
}
