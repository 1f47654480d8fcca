// cuBLAS as torch has loaded it: building needs neither the toolkit's header nor its library.
#pragma once

#include <cuda_runtime_api.h>
#include <library_types.h>

#include <cstdint>

#include "cpp/format/dtypes.h"

namespace qlora::cuda {

// A row-major matrix, rows `stride` elements apart.
struct Matrix {
  const void* data;
  int64_t stride;
};

// out [m, n] = a [m, k] · b, b [k, n], or [n, k] if `transposed`. If `adds`, the product is added to out instead. a and
// b are of `dtype`, out of `dtype` or float32.
// Every sum is in float32, without TF32 or 16-bit partial sums, whatever torch's settings allow. `handle` is torch's,
// for the current device and stream. Throws std::runtime_error with cuBLAS's message.
void multiply(void* handle, DType dtype, int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, bool transposed,
              bool adds, void* out, int64_t out_stride, DType out_dtype);

}  // namespace qlora::cuda
