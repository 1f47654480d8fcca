// Matrix products on the CPU for the stand-in cuBLAS libraries. All matrices are column-major.
#pragma once
#include <driver_types.h>
#include <library_types.h>

#include <cstddef>
#include <cstdint>

namespace cudasim::blas {

enum Status { success = 0, not_initialized = 1, invalid_value = 7, execution_failed = 13, not_supported = 15 };

// cublasComputeType_t
enum Compute {
  compute_16f = 64,
  compute_16f_pedantic = 65,
  compute_32f = 68,
  compute_32f_pedantic = 69,
  compute_64f = 70,
  compute_64f_pedantic = 71,
  compute_32i = 72,
  compute_32i_pedantic = 73,
  compute_32f_fast_16f = 74,
  compute_32f_fast_16bf = 75,
  compute_32f_fast_tf32 = 77
};
enum Epilogue : uint32_t { epilogue_default = 1, epilogue_relu = 2, epilogue_bias = 4, epilogue_gelu = 32 };

struct Matrix {
  void* data = nullptr;
  cudaDataType type = CUDA_R_32F;
  int64_t ld = 0;
  int64_t batch_stride = 0;  // elements; ignored with `pointers`
  bool transposed = false;   // as an operand
  bool row_major = false;    // as stored
  void* const* pointers = nullptr;
};

struct Gemm {
  int64_t m = 0, n = 0, k = 0, batch = 1;
  Matrix a, b, c, d;  // d = alpha * op(a) * op(b) + beta * c
  const void* alpha = nullptr;
  const void* beta = nullptr;
  int compute = compute_32f;
  cudaDataType scale_type = CUDA_R_32F;
  bool alpha_is_vector = false;  // one per row of d
  bool beta_is_zero = false;     // whatever `beta` says
  double factor = 1;             // further scale of the product
  uint32_t epilogue = epilogue_default;
  const void* bias = nullptr;  // one per row of d
  cudaDataType bias_type = CUDA_R_32F;
  int64_t bias_stride = 0;
  const char* caller = "";
  cudaStream_t stream = nullptr;
};
Status run(const Gemm&);
Status submit(const Gemm&);  // run, or record it if the stream is being captured

cudaDataType scale_type_of(int compute);
size_t size_of(cudaDataType);  // 0 if not simulated
double load(const void* base, int64_t index, cudaDataType);
void store(void* base, int64_t index, cudaDataType, double value);

}  // namespace cudasim::blas

// From libcudart (graph.cpp).
extern "C" int cudasim_begin_work(cudaStream_t);
extern "C" int cudasim_record(cudaStream_t, int (*run)(void*), void* data, void (*drop)(void*));
extern "C" void cudasim_refuse_capture(cudaStream_t, const char* why);

// From libcudart: the bytes from `p` to the end of its allocation, 0 if it is not in device memory.
extern "C" size_t cudasim_bytes_at(const void* p);
