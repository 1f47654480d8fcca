// The fused layer and its dx for few rows: linear_small and linear_dx_small do the call and return true, or leave it
// alone and return false. Included inside an anonymous namespace, once an instruction set; QLORA_STREAM names its
// vector vocabulary, and those that have none take nothing.

#ifdef QLORA_STREAM

namespace small {

inline constexpr int64_t kSmallDxRows = 16;
inline constexpr int64_t kMaxScratchBytes = int64_t{1} << 21;  // a thread
inline constexpr int64_t kWorthThreads = int64_t{1} << 18;     // multiply-adds: about what waking a thread costs

// Whether bfloat16 is multiplied in pairs, as the panels do it.
inline bool panels_dot([[maybe_unused]] DType dtype) {
#if QLORA_BF16_DOT
  return dtype == DType::kBFloat16 && prefers_bf16_dot();
#else
  return false;
#endif
}

// clang-format off: each uses the ones before it
#include QLORA_STREAM
#include "cpp/cpu/few_tokens/common-inl.h"
#include "cpp/cpu/few_tokens/low_rank-inl.h"
#include "cpp/cpu/few_tokens/forward-inl.h"
#include "cpp/cpu/few_tokens/dx_float-inl.h"
#if QLORA_INT_DX
#include "cpp/cpu/few_tokens/dx_int-inl.h"
#endif
// clang-format on

template <class T>
bool backward(const Pool& pool, const LinearDxProblem& p) {
  const int64_t padded = padded_rank(p.lora.rank);
  int64_t slices = p.lora.rank ? ceil_div(p.w.n, 512) : 0;
  while (slices > 8 && slices * p.m * padded * 4 > kMaxScratchBytes / 2) slices = ceil_div(slices, 2);
  const auto sum_with = [&](const auto& kernel) {
    Slabs slabs(p, kernel.tile_rows());
    float *g = nullptr, *partial = nullptr;
    const auto lay_out = [&](void* base) {
      Carver memory(base);
      g = memory.take<float>(p.m * padded);
      partial = memory.take<float>(slices * p.m * padded);
      slabs.sums = memory.take<float>(slabs.count * slabs.floats());
      return memory.used();
    };
    lay_out(scratch(ScratchUse::kCall, lay_out(nullptr)));
    if (slices) lora_g<T>(pool, p, partial, slices, g);
    dx_by_slabs<T>(pool, p, g, kernel, slabs);
  };
#if QLORA_INT_DX
  if (IntDx<T>::takes(p)) {
    sum_with(IntDx<T>(p));
    return true;
  }
#endif
  const FloatDx<T> kernel(p);
  if (4 * kernel.scale_floats() > kMaxScratchBytes / 2) return false;
  sum_with(kernel);
  return true;
}

// The panels are ahead sooner where they multiply bfloat16 in pairs, and dx's where rows of W start inside a lane
// (bench/cliffs.py, and bench/results/cpu_roofline.md for both sides of each bound). Where K is no multiple of 4,
// forward first arranges x for each of four or eight shifts.
inline constexpr int64_t kPanelGroup = 64;  // of weights that panels decode at once, where rows of W begin with one

bool linear_small(const Pool& pool, const LinearProblem& p) {
  int64_t most_rows = p.w.k % 4 ? 24 : 48;
  if (panels_dot(p.dtype)) most_rows = p.w.k % 4 ? 6 : p.w.k % kPanelGroup ? 12 : 10;
  if (p.m == 0 || p.m > most_rows || p.w.n == 0 || p.w.k == 0) return false;
  switch (p.dtype) {
    case DType::kFloat32:
      return p.m <= kMaxFloatRows && forward<float, FloatProducts>(pool, p) == Outcome::kDone;
    case DType::kBFloat16:
      return forward_16_bits<bfloat16>(pool, p);
    case DType::kFloat16:
      return forward_16_bits<float16>(pool, p);
    case DType::kFloat64:
      return false;
  }
  return false;
}
bool linear_dx_small(const Pool& pool, const LinearDxProblem& p) {
  const bool whole_blocks = p.w.k % kPanelGroup == 0 && p.w.scales.block_size >= kPanelGroup;
  int64_t most_rows = whole_blocks ? kSmallDxRows : p.w.k % kLaneWeights ? 6 : kRaggedDxRows;
  if (panels_dot(p.dtype)) most_rows = whole_blocks ? 6 : 4;
  if (p.m == 0 || p.m > most_rows || p.w.n == 0 || p.w.k == 0) return false;
  switch (p.dtype) {
    case DType::kFloat32:
      return false;
    case DType::kBFloat16:
      return backward<bfloat16>(pool, p);
    case DType::kFloat16:
      return backward<float16>(pool, p);
    case DType::kFloat64:
      return false;
  }
  return false;
}

}  // namespace small
using small::linear_dx_small;
using small::linear_small;

#else

bool linear_small(const Pool&, const LinearProblem&) { return false; }
bool linear_dx_small(const Pool&, const LinearDxProblem&) { return false; }

#endif
