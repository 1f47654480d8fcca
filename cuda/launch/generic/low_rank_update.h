// The epilogue of a library's float32 product: adds LoRA and bias, and rounds once.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cpp/format/problem.h"

namespace qlora::cuda {

// out = round(sum + mask ∘ (left · right) · keep_scale + bias).
struct LowRankUpdate {
  DType dtype = DType::kFloat32;  // of all but `sum`
  int64_t m = 0, columns = 0, rank = 0;
  const float* sum = nullptr;   // [m, columns], aligned to 16 bytes
  const void* left = nullptr;   // [m, rank]
  const void* right = nullptr;  // rank r of column c is element r * rank_stride + c * column_stride
  int64_t rank_stride = 0, column_stride = 0;
  const void* bias = nullptr;  // [columns] or null
  void* out = nullptr;         // [m, columns], rows `out_stride` apart
  int64_t out_stride = 0;
  Dropout dropout;           // applies to left · right; its mask is numbered in rows of out_stride elements
  int64_t first_column = 0;  // the column of such a row at which `out` begins
};

cudaError_t launch_low_rank_update(const LowRankUpdate& update, cudaStream_t stream);

}  // namespace qlora::cuda
