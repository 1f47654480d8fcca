// Panels of a decoded weight: ranges of the output's columns, and all terms of their sums or a part of them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cpp/format/grouped.h"
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

// A panel's place in w: whole rows, which are contiguous, or terms of rows. Rows that further terms extend are decoded
// one by one.
inline PackedPart part_of(const LinearProblem& p, const PanelRange& panel, bool extended = false) {
  const int64_t k = p.w.k, first = panel.first * k + panel.first_term;
  if (!extended && panel.inner == k) return {.first = first, .columns = panel.columns * k};
  return {.first = first, .rows = panel.columns, .columns = panel.inner, .stride = k};
}
// The same for dX: columns of w, or of some of its rows.
inline PackedPart part_of(const LinearDxProblem& p, const PanelRange& panel) {
  const int64_t k = p.w.k, first = panel.first_term * k + panel.first;
  if (panel.columns == k) return {.first = first, .columns = panel.inner * k};
  return {.first = first, .rows = panel.inner, .columns = panel.columns, .stride = k};
}

// Decodes terms of these rows of w to out [columns, inner + terms]. If there are further terms, they are the rows'
// lora_b and bias.
inline cudaError_t decode_panel(const LinearProblem& p, const PanelRange& panel, void* out, const Context& context,
                                int64_t terms = 0) {
  const int64_t rank = p.lora.rank, first = panel.first, columns = panel.columns;
  const PanelTerms further{.terms = terms,
                           .columns = columns,
                           .values = element(p.lora.b, first * rank, p.dtype),
                           .rank = rank,
                           .term_stride = 1,
                           .column_stride = rank,
                           .bias = element(p.bias, first, p.dtype),
                           .beside = true};
  return launch_dequantize_nf4(p.w, part_of(p, panel, terms > 0), p.dtype, out, true, context.device, context.stream,
                               terms > 0 ? further : PanelTerms{});
}

// Decodes these columns of rows of w to out [inner + terms, columns]. If there are further terms, they are the columns
// of lora_a.
inline cudaError_t decode_panel(const LinearDxProblem& p, const PanelRange& panel, void* out, const Context& context,
                                int64_t terms = 0) {
  const PanelTerms further{.terms = terms,
                           .columns = panel.columns,
                           .values = element(p.lora.a, panel.first, p.dtype),
                           .rank = p.lora.rank,
                           .term_stride = p.w.k,
                           .column_stride = 1};
  return launch_dequantize_nf4(p.w, part_of(p, panel), p.dtype, out, true, context.device, context.stream,
                               terms > 0 ? further : PanelTerms{});
}

// Decodes the panel of each expert that has tokens to out [experts, columns, inner], or [experts, inner, columns] for
// dX.
template <class Problem>
cudaError_t decode_panel(const Grouped<Problem>& p, const PanelRange& panel, void* out, const Context& context) {
  return launch_grouped_dequantize_nf4(p.stack.w, p.offsets, p.experts, part_of(p.stack, panel), p.stack.dtype, out,
                                       context.device, context.stream);
}

}  // namespace qlora::cuda
