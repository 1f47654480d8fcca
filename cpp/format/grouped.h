// Linear problems over experts: a stack of weights, each applied to its own rows. The rows of x [m, k] are in the order
// of their experts, and so are those of y, dy and dx. The stacked tensors are w [e, n, k], bias [e, n], lora_a [e, r,
// k], lora_b [e, n, r] and the gradients da and db. Dropout depends on the index of an element in all of x.
#pragma once

#include <cstdint>

#include "cpp/format/problem.h"

namespace qlora {

template <class Problem>
struct Grouped {
  Problem stack;                     // all m rows, and the first expert's weight, bias and LoRA
  const int64_t* offsets = nullptr;  // [experts]: expert i's rows end at offsets[i], and those of i + 1 begin there
  int64_t experts = 0;
};

// The operands of all rows, and of experts the first one's.
template <class Problem>
constexpr auto& stack_of(Problem& p) {
  if constexpr (requires { p.stack; })
    return p.stack;
  else
    return p;
}

// The distances from one expert's weights to the next expert's.
struct WeightStride {
  int64_t packed_bytes = 0, blocks = 0, nested_blocks = 0;
};

QLORA_INLINE WeightStride weight_stride(const Weight& w) {
  WeightStride stride;
  stride.packed_bytes = packed_bytes(w.n * w.k, w.bits());
  stride.blocks = ceil_div(w.n * w.k, w.scales.block_size);
  stride.nested_blocks = ceil_div(stride.blocks, w.scales.nested_block_size);
  return stride;
}

// The scales of `expert`, given those of the first expert, `s`.
QLORA_HD Scales expert_scales(const Scales& s, const WeightStride& stride, int64_t expert) {
  return scales_after(s, expert, stride.blocks, stride.nested_blocks);
}

}  // namespace qlora
