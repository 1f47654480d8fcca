// The fused linear layer and its gradients: which kernel takes which problem. Included inside the kernels' anonymous
// namespace, after the instruction set's mma_*.h.

namespace panel {

#include "cpp/cpu/dlora-inl.h"
#include "cpp/cpu/linear_f64-inl.h"
#include "cpp/cpu/linear_panel-inl.h"

// bfloat16 elements are multiplied in pairs where the processor does that well, and widened to float32 elsewhere.
template <class Function>
inline void with_bf16_word(const Function& f) {
#if QLORA_BF16_DOT
  if (prefers_bf16_dot()) return f(WordBf16{});
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
      return panel::with_bf16_word([&](auto word) { panel::linear<decltype(word), bfloat16>(pool, p); });
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
      return panel::with_bf16_word([&](auto word) { panel::linear_dx<decltype(word), bfloat16>(pool, p); });
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
      return panel::with_bf16_word([&](auto word) { panel::lora_gradients<decltype(word), bfloat16>(pool, p); });
    case DType::kFloat16:
      return panel::lora_gradients<panel::WordF32, float16>(pool, p);
    case DType::kFloat64:
      return panel::lora_gradients_f64(pool, p);
  }
}
