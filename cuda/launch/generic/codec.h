// The codec's launchers take plain device pointers and a stream, and return the launch's error. An empty tensor
// launches nothing. Encoded and decoded bits equal those of the CPU kernels (cpp/cpu/kernels.h). Any alignment works.
// Dense data aligned to 16 bytes and packed data aligned to 8, as torch allocates them, is fast.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cpp/format/problem.h"
#include "cuda/launch/device.h"
#include "cuda/launch/launch.h"

namespace qlora::cuda {

// w [numel] (float32, bfloat16 or float16) -> packed [ceil(numel / 2)] and absmax [ceil(numel / block_size)].
cudaError_t launch_quantize_nf4(Code code, DType dtype, const void* w, int64_t numel, int64_t block_size,
                                uint8_t* packed, float* absmax, cudaStream_t stream);

// w [numel] in rows of k, importance [k] -> the absmax [ceil(numel / block_size)] that minimizes the sum of squared
// errors of the codes, weighted by the importance of their columns.
cudaError_t launch_search_absmax_nf4(Code code, DType dtype, const void* w, const float* importance, int64_t numel,
                                     int64_t k, int64_t block_size, float* absmax, cudaStream_t stream);

// w [numel] under the scales absmax [ceil(numel / block_size)] -> packed [ceil(numel / 2)].
cudaError_t launch_encode_nf4(Code code, DType dtype, const void* w, const float* absmax, int64_t numel,
                              int64_t block_size, uint8_t* packed, cudaStream_t stream);

// The same, under scales that were computed from w: the second of the two launches of launch_quantize_nf4.
cudaError_t launch_encode_own(Code code, DType dtype, const void* w, const float* absmax, int64_t numel,
                              int64_t block_size, uint8_t* packed, cudaStream_t stream);

// The same as launch_encode_nf4, with stochastic rounding (cpp/format/stochastic.h).
cudaError_t launch_encode_nf4_stochastic(Code code, DType dtype, const void* w, const float* absmax, int64_t numel,
                                         int64_t block_size, uint64_t seed, uint8_t* packed, cudaStream_t stream);

// Rounds to the nearest codes and compensates each rounding error in the columns that are rounded later: in `order`,
// with the factors `feedback` (cpp/cpu/kernels.h). The contents of these two are not checked: an entry of `order` that
// is not a column counts as column 0, and codes of columns that `order` lacks are undefined.
struct FeedbackProblem {
  Code code;
  DType dtype;
  const void* w;        // [n, k]
  const float* absmax;  // [ceil(n * k / block_size)]
  int64_t n, k, block_size;
  const float* feedback;  // [k, k]
  const int64_t* order;   // [k]
  uint8_t* packed;        // [ceil(n * k / 2)]
};
cudaError_t launch_encode_nf4_with_feedback(const FeedbackProblem& p, const Context& context);

// The doubles of workspace that launch_quantize_absmax needs for `count` values.
int64_t quantize_absmax_workspace(int64_t count);

// absmax [count] -> codes [count], nested_absmax [ceil(count / nested_block_size)], nested_offset [1].
cudaError_t launch_quantize_absmax(const float* absmax, int64_t count, int64_t nested_block_size, uint8_t* codes,
                                   float* nested_absmax, float* nested_offset, double* workspace, cudaStream_t stream);

// Scales of `count` blocks -> absmax [count].
cudaError_t launch_dequantize_absmax(const Scales& scales, int64_t count, float* absmax, const Device& device,
                                     cudaStream_t stream);

// A part of the packed tensor: `rows` pieces of `columns` elements. The first begins at element `first`, and each next
// one `stride` elements later.
struct PackedPart {
  int64_t first = 0, rows = 1, columns = 0, stride = 0;
};

// Terms that extend a decoded panel of a weight, beside its rows or below them: terms of LoRA, then bias, then zeros.
struct PanelTerms {
  int64_t terms = 0, columns = 0;  // columns of the matmul's output
  const void* values = nullptr;    // term t < rank of column c at values[t * term_stride + c * column_stride]
  int64_t rank = 0, term_stride = 0, column_stride = 0;
  const void* bias = nullptr;  // term `rank` of each column, or null
  bool beside = false;         // `terms` more elements in each of the panel's rows; otherwise `terms` more rows
};

// That part -> out [rows, columns] (float32, bfloat16 or float16), with further terms only if `read_soon`. The same
// launch decodes nested scales. It is fastest if a single piece begins at a multiple of kMaxBlockSize, or if the stride
// and columns of several pieces are multiples of 8. `read_soon`: keeps the output in L2 if possible, for the next
// kernel.
cudaError_t launch_dequantize_nf4(const Weight& w, const PackedPart& part, DType dtype, void* out, bool read_soon,
                                  const Device& device, cudaStream_t stream, const PanelTerms& terms = {});

// That part of each expert's weight -> out [experts, rows, columns] (bfloat16 or float16), as with `read_soon`. `first`
// is the first expert's weight, and `offsets` are those of Grouped. Experts without tokens are skipped. There are at
// most kMostDecodedExperts (cuda/tuning/codec.h).
cudaError_t launch_grouped_dequantize_nf4(const Weight& first, const int64_t* offsets, int64_t experts,
                                          const PackedPart& part, DType dtype, void* out, const Device& device,
                                          cudaStream_t stream);

}  // namespace qlora::cuda
