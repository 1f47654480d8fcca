// Panels of a decoded weight: ranges of the output's columns, which hold the columns' complete sums.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/launch/generic/codec.h"
#include "cuda/launch/launch.h"

namespace qlora::cuda {

// Returns the address of an element, or null if there is no data.
inline const void* element(const void* base, int64_t index, DType dtype) {
  return base == nullptr ? nullptr : static_cast<const uint8_t*>(base) + index * dtype_bytes(dtype);
}
inline void* element(void* base, int64_t index, DType dtype) {
  return static_cast<uint8_t*>(base) + index * dtype_bytes(dtype);
}

// Decodes rows first .. first + columns - 1 of w to out [columns, k + terms]. If there are further terms, they are the
// rows' lora_b and bias.
inline cudaError_t decode_panel(const LinearProblem& p, int64_t first, int64_t columns, void* out,
                                const Context& context, int64_t terms = 0) {
  const int64_t k = p.w.k, rank = p.lora.rank;
  const PackedPart dense{.first = first * k, .columns = columns * k};
  const PackedPart rows{.first = first * k, .rows = columns, .columns = k, .stride = k};
  const PanelTerms further{.terms = terms,
                           .columns = columns,
                           .values = element(p.lora.b, first * rank, p.dtype),
                           .rank = rank,
                           .term_stride = 1,
                           .column_stride = rank,
                           .bias = element(p.bias, first, p.dtype),
                           .beside = true};
  return launch_dequantize_nf4(p.w, terms > 0 ? rows : dense, p.dtype, out, true, context.device, context.stream,
                               terms > 0 ? further : PanelTerms{});
}

// Decodes columns first .. first + columns - 1 of w to out [n + terms, columns]. If there are further terms, they are
// the columns of lora_a.
inline cudaError_t decode_panel(const LinearDxProblem& p, int64_t first, int64_t columns, void* out,
                                const Context& context, int64_t terms = 0) {
  const PackedPart whole{.columns = p.w.n * p.w.k};
  const PackedPart part{.first = first, .rows = p.w.n, .columns = columns, .stride = p.w.k};
  const PanelTerms further{.terms = terms,
                           .columns = columns,
                           .values = element(p.lora.a, first, p.dtype),
                           .rank = p.lora.rank,
                           .term_stride = p.w.k,
                           .column_stride = 1};
  return launch_dequantize_nf4(p.w, columns == p.w.k ? whole : part, p.dtype, out, true, context.device, context.stream,
                               terms > 0 ? further : PanelTerms{});
}

}  // namespace qlora::cuda
