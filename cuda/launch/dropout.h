#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cpp/format/problem.h"

namespace qlora::cuda {

// Multiplies x [numel] (float32, bfloat16 or float16; row-major, as the mask is numbered) by the dropout mask, in
// place.
cudaError_t launch_dropout(DType dtype, void* x, int64_t numel, const Dropout& dropout, cudaStream_t stream);

}  // namespace qlora::cuda
