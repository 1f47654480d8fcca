// Panels of a decoded weight: ranges of the output's columns, which hold the columns' complete sums.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/launch/any/codec.h"
#include "cuda/launch/launch.h"

namespace qlora::cuda {

// Decodes rows first .. first + columns - 1 of w to out [columns, k].
inline cudaError_t decode_panel(const LinearProblem& p, int64_t first, int64_t columns, void* out,
                                const Context& context) {
  const PackedPart part{.first = first * p.w.k, .columns = columns * p.w.k};
  return launch_dequantize_nf4(p.w, part, p.dtype, out, true, context.device, context.stream);
}

// Decodes columns first .. first + columns - 1 of w to out [n, columns].
inline cudaError_t decode_panel(const LinearDxProblem& p, int64_t first, int64_t columns, void* out,
                                const Context& context) {
  const PackedPart whole{.columns = p.w.n * p.w.k};
  const PackedPart part{.first = first, .rows = p.w.n, .columns = columns, .stride = p.w.k};
  return launch_dequantize_nf4(p.w, columns == p.w.k ? whole : part, p.dtype, out, true, context.device,
                               context.stream);
}

}  // namespace qlora::cuda
