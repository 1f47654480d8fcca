// Calls cuBLAS through the symbols of the library that torch has loaded.
#include "cuda/launch/generic/cublas.h"

#include <stdexcept>
#include <string>

// cublas_api.h declares these, with enumerations for the integers.
extern "C" {
int cublasGemmEx_64(void* handle, int op_a, int op_b, int64_t m, int64_t n, int64_t k, const void* alpha, const void* a,
                    cudaDataType a_type, int64_t lda, const void* b, cudaDataType b_type, int64_t ldb, const void* beta,
                    void* c, cudaDataType c_type, int64_t ldc, int compute_type, int algorithm);
int cublasGetMathMode(void* handle, int* mode);
int cublasSetMathMode(void* handle, int mode);
const char* cublasGetStatusString(int status);
}

namespace qlora::cuda {
namespace {

constexpr int kNoTranspose = 0, kTranspose = 1;  // cublasOperation_t
constexpr int kCompute32F = 68;                  // cublasComputeType_t
constexpr int kDefaultAlgorithm = -1;            // cublasGemmAlgo_t
constexpr int kDefaultMath = 0,
              kNo16BitPartials = 16;  // cublasMath_t: CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION

void check(int status) {
  if (status != 0) throw std::runtime_error(std::string("cuBLAS: ") + cublasGetStatusString(status));
}

cudaDataType type_of(DType dtype) {
  return dtype == DType::kFloat32 ? CUDA_R_32F : dtype == DType::kBFloat16 ? CUDA_R_16BF : CUDA_R_16F;
}

// The handle belongs to torch, so its mode is restored.
class FullPrecision {
 public:
  explicit FullPrecision(void* handle) : handle_(handle) {
    check(cublasGetMathMode(handle_, &before_));
    check(cublasSetMathMode(handle_, kDefaultMath | kNo16BitPartials));
  }
  ~FullPrecision() { cublasSetMathMode(handle_, before_); }
  FullPrecision(const FullPrecision&) = delete;
  FullPrecision& operator=(const FullPrecision&) = delete;

 private:
  void* handle_;
  int before_ = kDefaultMath;
};

}  // namespace

void multiply(void* handle, DType dtype, int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, bool transposed,
              bool adds, void* out, int64_t out_stride, DType out_dtype) {
  const FullPrecision precision(handle);
  const float one = 1.0f, zero = 0.0f;
  // cuBLAS's matrices are column-major: it makes outᵀ = bᵀ · aᵀ.
  check(cublasGemmEx_64(handle, transposed ? kTranspose : kNoTranspose, kNoTranspose, n, m, k, &one, b.data,
                        type_of(dtype), b.stride, a.data, type_of(dtype), a.stride, adds ? &one : &zero, out,
                        type_of(out_dtype), out_stride, kCompute32F, kDefaultAlgorithm));
}

}  // namespace qlora::cuda
