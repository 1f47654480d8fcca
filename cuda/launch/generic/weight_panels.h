// Panels of a decoded weight: ranges of the output's columns, and all terms of their sums or a part of them.
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

struct PanelRange {
  int64_t first, columns;         // of the output
  int64_t first_term = 0, inner;  // terms of the sums, without further ones
};

// Decodes terms of these rows of w to out [columns, inner + terms]. If there are further terms, they are the rows'
// lora_b and bias.
inline cudaError_t decode_panel(const LinearProblem& p, const PanelRange& panel, void* out, const Context& context,
                                int64_t terms = 0) {
  const int64_t k = p.w.k, rank = p.lora.rank, first = panel.first, columns = panel.columns;
  const PackedPart dense{.first = first * k, .columns = columns * k};
  const PackedPart rows{.first = first * k + panel.first_term, .rows = columns, .columns = panel.inner, .stride = k};
  const PanelTerms further{.terms = terms,
                           .columns = columns,
                           .values = element(p.lora.b, first * rank, p.dtype),
                           .rank = rank,
                           .term_stride = 1,
                           .column_stride = rank,
                           .bias = element(p.bias, first, p.dtype),
                           .beside = true};
  const bool in_rows = terms > 0 || panel.inner < k;
  return launch_dequantize_nf4(p.w, in_rows ? rows : dense, p.dtype, out, true, context.device, context.stream,
                               terms > 0 ? further : PanelTerms{});
}

// Decodes these columns of rows of w to out [inner + terms, columns]. If there are further terms, they are the columns
// of lora_a.
inline cudaError_t decode_panel(const LinearDxProblem& p, const PanelRange& panel, void* out, const Context& context,
                                int64_t terms = 0) {
  const int64_t k = p.w.k, first = panel.first, columns = panel.columns;
  const PackedPart dense{.first = panel.first_term * k, .columns = panel.inner * k};
  const PackedPart part{.first = panel.first_term * k + first, .rows = panel.inner, .columns = columns, .stride = k};
  const PanelTerms further{.terms = terms,
                           .columns = columns,
                           .values = element(p.lora.a, first, p.dtype),
                           .rank = p.lora.rank,
                           .term_stride = p.w.k,
                           .column_stride = 1};
  return launch_dequantize_nf4(p.w, columns == k ? dense : part, p.dtype, out, true, context.device, context.stream,
                               terms > 0 ? further : PanelTerms{});
}

}  // namespace qlora::cuda
