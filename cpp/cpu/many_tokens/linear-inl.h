// The fused linear layer and its gradients: which kernel takes which problem. Included inside the kernels' anonymous
// namespace, after the instruction set's mma_*.h.

namespace panel {

#include "cpp/cpu/many_tokens/dlora-inl.h"
#include "cpp/cpu/float64/linear-inl.h"
#include "cpp/cpu/many_tokens/forward-inl.h"

#if QLORA_BF16_DOT
// The multiplication of bfloat16 in pairs takes subnormal factors, products and sums for zero. None that matters is
// subnormal where each row of a dense operand has a value of at least 2^-50, and each scale of W is at least 2^-60, if
// they are not 0.
inline bool in_range(const void* matrix, int64_t rows, int64_t columns) {
  constexpr uint16_t kEnough = (127 - 50) << 7;
  const bfloat16* x = static_cast<const bfloat16*>(matrix);
  for (int64_t r = 0; r < rows; ++r, x += columns) {
    uint16_t largest = 0;
    for (int64_t c = 0; c < columns && largest < kEnough; c += 64) {  // the first 64 mostly settle it
      for (int64_t i = c; i < columns && i < c + 64; ++i) {
        const uint16_t bits = x[i].bits & 0x7FFFu;
        largest = bits > largest ? bits : largest;
      }
    }
    if (largest && largest < kEnough) return false;
  }
  return true;
}

inline bool in_range(const Pool& pool, const Weight& w) {
  // Doubly quantized scales are 0 or no smaller than a last place of their mean.
  if (w.scales.codes) return *w.scales.nested_offset > 0x1p-30f;
  constexpr uint32_t kEnough = (127u - 60u) << 23;
  bool all = true;
  auto body = [&](int64_t begin, int64_t end) {
    uint32_t smallest = ~0u;  // minus one, which makes 0 the largest
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t bits = (float_bits(w.scales.absmax[i]) & 0x7FFFFFFFu) - 1u;
      smallest = bits < smallest ? bits : smallest;
    }
    if (smallest < kEnough - 1u) __atomic_store_n(&all, false, __ATOMIC_RELAXED);
  };
  pool(ceil_div(w.n * w.k, w.scales.block_size), 1 << 15, body);
  return all;
}

inline bool in_range(const Pool& pool, const LinearProblem& p) {
  return in_range(p.x, p.m, p.w.k) && in_range(pool, p.w);
}
inline bool in_range(const Pool& pool, const LinearDxProblem& p) {
  return in_range(p.dy, p.m, p.w.n) && in_range(pool, p.w);
}
inline bool in_range(const Pool&, const LoraGradProblem& p) {
  return in_range(p.x, p.m, p.k) && in_range(p.dy, p.m, p.n) && in_range(p.lora.a, p.lora.rank, p.k) &&
         in_range(p.lora.b, p.n, p.lora.rank);
}
#endif

// bfloat16 elements are multiplied in pairs where the processor does that well, and widened to float32 elsewhere.
template <class Problem, class Function>
inline void with_bf16_word([[maybe_unused]] const Pool& pool, [[maybe_unused]] const Problem& p, const Function& f) {
#if QLORA_BF16_DOT
  if (prefers_bf16_dot() && in_range(pool, p)) return f(WordBf16{});
#endif
  f(WordF32{});
}

}  // namespace panel

void linear_nf4(const Pool& pool, const LinearProblem& p) {
  if (linear_small(pool, p)) return;
  switch (p.dtype) {
    case DType::kFloat32:
      return panel::linear<panel::WordF32, float>(pool, p);
    case DType::kBFloat16:
      return panel::with_bf16_word(pool, p, [&](auto word) { panel::linear<decltype(word), bfloat16>(pool, p); });
    case DType::kFloat16:
      return panel::linear<panel::WordF32, float16>(pool, p);
    case DType::kFloat64:
      return panel::linear_f64(pool, p);
  }
}

void linear_nf4_dx(const Pool& pool, const LinearDxProblem& p) {
  if (linear_dx_small(pool, p)) return;
  switch (p.dtype) {
    case DType::kFloat32:
      return panel::linear_dx<panel::WordF32, float>(pool, p);
    case DType::kBFloat16:
      return panel::with_bf16_word(pool, p, [&](auto word) { panel::linear_dx<decltype(word), bfloat16>(pool, p); });
    case DType::kFloat16:
      return panel::linear_dx<panel::WordF32, float16>(pool, p);
    case DType::kFloat64:
      return panel::linear_dx_f64(pool, p);
  }
}

void linear_nf4_dlora(const Pool& pool, const LoraGradProblem& p) {
  switch (p.dtype) {
    case DType::kFloat32:
      return panel::lora_gradients<panel::WordF32, float>(pool, p);
    case DType::kBFloat16:
      return panel::with_bf16_word(pool, p,
                                   [&](auto word) { panel::lora_gradients<decltype(word), bfloat16>(pool, p); });
    case DType::kFloat16:
      return panel::lora_gradients<panel::WordF32, float16>(pool, p);
    case DType::kFloat64:
      return panel::lora_gradients_f64(pool, p);
  }
}
