// LoRA's low-rank products, out = round(scaling · dropout(x) · aᵀ): h of the forward, and g = round(scaling · dy ·
// lora_b) of the backward.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cpp/format/problem.h"
#include "cuda/launch/workspace.h"

namespace qlora::cuda {

struct LowRankProblem {
  DType dtype = DType::kFloat32;  // of x, a, out
  int64_t m = 0, k = 0, rank = 0;
  const void* x = nullptr;  // [m, k]; like `a`, aligned to 16 bytes
  const void* a = nullptr;  // [rank, k], or [k, rank] if transposed
  bool transposed = false;
  double scaling = 1.0;
  Dropout dropout;      // applies to x
  void* out = nullptr;  // [m, rank]
  // [m, k + terms], aligned to 16 bytes, or null: the kernel also writes [x | out | 1 if has_one | zeros] there.
  // Requires 16-bit types, k % 8 == 0, terms % 8 == 0 and, if transposed, an even rank. Then `out` may be null.
  struct Extended {
    void* rows = nullptr;
    int64_t terms = 0;
    bool has_one = false;
  } extended = {};
  Tickets clear = {};  // also set to zero by the kernel, which saves the next kernel a memset
};

// The ranks of each adapter. A launcher gets several adapters (Lora::adapters) as one stack, in which all have equally
// many ranks. Their h or g has been computed before (cuda/launch/generic/adapters.h).
inline int64_t adapter_ranks(const Lora& lora) {
  return lora.adapters != nullptr && lora.adapters->count > 0 ? lora.rank / lora.adapters->count : lora.rank;
}

// The problem of h = scaling · dropout(x) · lora_aᵀ for x [m, k].
inline LowRankProblem h_problem(DType dtype, int64_t m, int64_t k, const void* x, const Lora& lora, void* out) {
  return {.dtype = dtype,
          .m = m,
          .k = k,
          .rank = lora.adapters != nullptr ? 0 : lora.rank,
          .x = x,
          .a = lora.a,
          .scaling = lora.scaling,
          .dropout = lora.dropout,
          .out = out};
}

// The problem of g = scaling · dy · lora_b for dy [m, n].
inline LowRankProblem g_problem(DType dtype, int64_t m, int64_t n, const void* dy, const Lora& lora, void* out) {
  return {.dtype = dtype,
          .m = m,
          .k = n,
          .rank = lora.adapters != nullptr ? 0 : lora.rank,
          .x = dy,
          .a = lora.b,
          .transposed = true,
          .scaling = lora.scaling,
          .dropout = {},
          .out = out};
}

// Sums in float32 in a fixed order. If m or rank is 0, only the tickets are cleared.
cudaError_t launch_low_rank(const LowRankProblem& problem, cudaStream_t stream);

}  // namespace qlora::cuda
