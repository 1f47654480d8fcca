// Linear problems of a stack of weights, the experts of a mixture, each over rows of its own: x [m, k] has its rows in
// the order of their experts, and so have y, dy and dx. Stacked are w [e, n, k], bias [e, n], lora_a [e, r, k],
// lora_b [e, n, r] and their gradients, da and db; dropout goes by the index of an element in all of x.
#pragma once

#include <cstdint>

#include "cpp/format/problem.h"

namespace qlora {

template <class Problem>
struct Grouped {
  Problem stack;                     // all m rows, and the first expert's weight, bias and LoRA
  const int64_t* offsets = nullptr;  // [experts]: expert i's rows end at offsets[i], where those of i + 1 begin
  int64_t experts = 0;
};

// What lies between the weights of one expert and the next.
struct WeightStride {
  int64_t packed_bytes = 0, blocks = 0, nested_blocks = 0;
};

QLORA_INLINE WeightStride weight_stride(const Weight& w) {
  WeightStride stride;
  stride.packed_bytes = packed_bytes(w.n * w.k);
  stride.blocks = ceil_div(w.n * w.k, w.scales.block_size);
  stride.nested_blocks = ceil_div(stride.blocks, w.scales.nested_block_size);
  return stride;
}

// Those of `expert`, where `s` are the first one's.
QLORA_HD Scales expert_scales(const Scales& s, const WeightStride& stride, int64_t expert) {
  return scales_after(s, expert, stride.blocks, stride.nested_blocks);
}

}  // namespace qlora
