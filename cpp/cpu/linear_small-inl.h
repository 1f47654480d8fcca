// The fused layer and its dx for few rows: linear_small and linear_dx_small do the call and return true, or leave it
// alone and return false. Included inside an anonymous namespace, once an instruction set; QLORA_STREAM names its
// vector vocabulary, and those that have none take nothing.

#ifdef QLORA_STREAM

namespace small {

inline constexpr int64_t kSmallRows = 16;
inline constexpr int64_t kMaxScratchBytes = int64_t{1} << 21;  // a thread
inline constexpr int64_t kWorthThreads = int64_t{1} << 18;     // multiply-adds: about what waking a thread costs

// clang-format off: each uses the ones before it
#include QLORA_STREAM
#include "cpp/cpu/small_common-inl.h"
#include "cpp/cpu/small_lora-inl.h"
#include "cpp/cpu/small_forward-inl.h"
#include "cpp/cpu/small_dx-inl.h"
// clang-format on

bool linear_small(const Pool& pool, const LinearProblem& p) {
  if (p.m == 0 || p.m > kSmallRows || p.w.n == 0 || p.w.k == 0) return false;
  switch (p.dtype) {
    case DType::kFloat32:
      return false;
    case DType::kBFloat16:
      return forward<IntProducts, bfloat16>(pool, p, 0);
    case DType::kFloat16:
      return forward<IntProducts, float16>(pool, p, 0);
    case DType::kFloat64:
      return false;
  }
  return false;
}
bool linear_dx_small(const Pool& pool, const LinearDxProblem& p) {
  if (p.m == 0 || p.m > kSmallRows || p.w.n == 0 || p.w.k == 0) return false;
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
