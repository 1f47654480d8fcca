// The codec's launchers: plain pointers and a stream in, the launch's error out. Pointers are to the device's memory;
// an empty tensor launches nothing. Encoded and decoded bits are those of the CPU kernels (cpp/cpu/kernels.h). Any
// alignment works; dense data aligned to 16 bytes and packed data to 4, as torch allocates, is fast.
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

// w [numel] in rows of k, importance [k] -> absmax [ceil(numel / block_size)] for which the squared errors of the
// codes, each times the importance of its column, sum to the least.
cudaError_t launch_search_absmax_nf4(Code code, DType dtype, const void* w, const float* importance, int64_t numel,
                                     int64_t k, int64_t block_size, float* absmax, cudaStream_t stream);

// w [numel] under the scales absmax [ceil(numel / block_size)] -> packed [ceil(numel / 2)].
cudaError_t launch_encode_nf4(Code code, DType dtype, const void* w, const float* absmax, int64_t numel,
                              int64_t block_size, uint8_t* packed, cudaStream_t stream);

// The same under scales that were taken from w: launch_quantize_nf4 by two launches.
cudaError_t launch_encode_own(Code code, DType dtype, const void* w, const float* absmax, int64_t numel,
                              int64_t block_size, uint8_t* packed, cudaStream_t stream);

// The same as launch_encode_nf4, rounded up or down at random (cpp/format/stochastic.h).
cudaError_t launch_encode_nf4_stochastic(Code code, DType dtype, const void* w, const float* absmax, int64_t numel,
                                         int64_t block_size, uint64_t seed, uint8_t* packed, cudaStream_t stream);

// Rounded to the nearest codes, where each rounding error is made good by the columns that are rounded later: in
// `order`, with the factors `feedback` (cpp/cpu/kernels.h). What these two hold is not looked at before: an entry of
// order that is no column stands for column 0, and codes that nothing was rounded to are any.
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
cudaError_t launch_encode_nf4_with_feedback(const FeedbackProblem& p, const Device& device, const Allocator& allocate,
                                            cudaStream_t stream);

// Doubles of scratch that launch_quantize_absmax wants for `count` values.
int64_t quantize_absmax_workspace(int64_t count);

// absmax [count] -> codes [count], nested_absmax [ceil(count / nested_block_size)], nested_offset [1].
cudaError_t launch_quantize_absmax(const float* absmax, int64_t count, int64_t nested_block_size, uint8_t* codes,
                                   float* nested_absmax, float* nested_offset, double* workspace, cudaStream_t stream);

// Scales of `count` blocks -> absmax [count].
cudaError_t launch_dequantize_absmax(const Scales& scales, int64_t count, float* absmax, const Device& device,
                                     cudaStream_t stream);

// A part of the packed tensor: `rows` pieces of `columns` elements, the first from element `first` on, each `stride`
// further.
struct PackedPart {
  int64_t first = 0, rows = 1, columns = 0, stride = 0;
};

// That part -> out [rows, columns] (float32, bfloat16 or float16), nested scales decoded in the same launch. For whole
// speed a single piece begins at a multiple of kMaxBlockSize, and several have a stride and columns that are multiples
// of 8. `read_soon`: what is written stays in L2 as long as it can, for the kernel that follows.
cudaError_t launch_dequantize_nf4(const Weight& w, const PackedPart& part, DType dtype, void* out, bool read_soon,
                                  const Device& device, cudaStream_t stream);

}  // namespace qlora::cuda
