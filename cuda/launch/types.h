// Maps an operator's dtype to a C++ type.
#pragma once

#include <cuda_runtime_api.h>

#include "cpp/format/dtypes.h"

namespace qlora::cuda {

// Calls use(T{}) with the type that dtype names: bfloat16 or float16.
template <class Use>
cudaError_t with_16_bit_type(DType dtype, const Use& use) {
  if (dtype == DType::kBFloat16) return use(bfloat16{});
  if (dtype == DType::kFloat16) return use(float16{});
  return cudaErrorInvalidValue;
}

// The same, also for float32.
template <class Use>
cudaError_t with_type(DType dtype, const Use& use) {
  return dtype == DType::kFloat32 ? use(float{}) : with_16_bit_type(dtype, use);
}

// The types that the kernels of exact products are compiled for (generic::exact_accepts).
template <class Use>
cudaError_t with_exact_type(DType dtype, const Use& use) {
  if (dtype == DType::kFloat32) return use(float{});
  return dtype == DType::kFloat16 ? use(float16{}) : cudaErrorInvalidValue;
}

}  // namespace qlora::cuda
