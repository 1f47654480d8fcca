// Adds LoRA as a continuation of the forward's sum: [x | h] · [w | lora_b]ᵀ, 16 ranks per mma. A lane takes 4
// consecutive ranks of its rows straight from global memory, because h and lora_b are small, and only one warp uses
// each byte of lora_b.
#pragma once

#include <cstdint>

#include "cuda/ptx/mma.cuh"

namespace qlora::tile {

// Loads ranks first .. first + 3 of the `rank` ranks at `of`, which are a token's h or a row of lora_b. Ranks beyond
// `rank` are zeros, and so are all ranks unless `valid`. kVector requires rank % 4 == 0, and h and lora_b aligned to 8
// bytes. kConstant: nobody writes them while the kernel runs. That is true of lora_b, also of a stack of adapters,
// which is complete before the launch that computes h. It is not true of h: that launch may still run when a kernel
// starts, and the compiler may move an `__ldg` before the wait for it.
template <class T, bool kVector, bool kConstant = false>
__device__ __forceinline__ uint2 load_4_ranks(const T* of, int64_t first, int64_t rank, bool valid) {
  const auto load = [](const auto* at) { return kConstant ? __ldg(at) : *at; };
  if constexpr (kVector) {
    return valid && first < rank ? load(reinterpret_cast<const uint2*>(of + first)) : make_uint2(0, 0);
  } else {
    uint32_t v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      v[i] = valid && first + i < rank ? load(reinterpret_cast<const uint16_t*>(of + first + i)) : 0u;
    return make_uint2(v[0] | v[1] << 16, v[2] | v[3] << 16);
  }
}

template <class T>
struct LoraOperands {
  const T* h;  // [m, rank]
  const T* b;  // [n, rank]
  int64_t rank;
  int64_t m, n;
  int64_t adapter_ranks;  // the rank, or the ranks of each adapter of a stack
};

// Calls use(step) for the steps of 16 ranks that belong to turn `turn` of `turns`. Turns begin anew with each adapter
// of a stack, so a token's sum has the parts that it has in a call with the token's adapter alone. Without kStack,
// there is one adapter, which takes fewer registers.
template <bool kStack = true, class Use>
__device__ __forceinline__ void for_lora_steps(int64_t rank, int64_t adapter_ranks, int64_t turn, int64_t turns,
                                               const Use& use) {
  const int64_t steps = (rank + 15) / 16, adapter_steps = kStack ? (adapter_ranks + 15) / 16 : steps;
  for (int64_t first = 0; first < steps; first += adapter_steps) {
    for (int64_t step = turn; step < adapter_steps; step += turns) use(first + step);
    if constexpr (!kStack) return;
  }
}

// Adds the ranks [16 step, 16 step + 16) to acc[i][j], for the rows from row0 + 16 i and the tokens from token0 + 8 j.
template <class T, bool kVector, int kRowTiles, int kTokenTiles>
__device__ __forceinline__ void lora_step(const LoraOperands<T>& p, int64_t row0, int64_t token0, int64_t step,
                                          float (&acc)[kRowTiles][kTokenTiles][4]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int64_t first = 16 * step + 4 * t;
  uint2 b[kRowTiles][2];
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const int64_t row = row0 + 8 * i + g;
    b[i / 2][i % 2] = load_4_ranks<T, kVector, true>(p.b + row * p.rank, first, p.rank, row < p.n);
  }
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) {
    const int64_t token = token0 + 8 * j + g;
    const uint2 h = load_4_ranks<T, kVector>(p.h + token * p.rank, first, p.rank, token < p.m);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
      ptx::mma_m16n8k16<T>(acc[i][j], b[i][0].x, b[i][1].x, b[i][0].y, b[i][1].y, h.x, h.y);
  }
}

}  // namespace qlora::tile
