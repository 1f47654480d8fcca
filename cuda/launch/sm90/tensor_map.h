// Descriptors of matrices for TMA.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace qlora::cuda {

// A row-major matrix that TMA copies boxes from. Rows begin at multiples of 16 bytes.
struct TensorMapProblem {
  CUtensorMapDataType type;
  const void* data;
  int64_t rows, columns, row_bytes;
  int box_rows, box_columns;
  CUtensorMapSwizzle swizzle;
};

// Returns cudaErrorNotSupported if the driver has no TMA.
cudaError_t make_tensor_map(const TensorMapProblem& problem, CUtensorMap* map);

}  // namespace qlora::cuda
