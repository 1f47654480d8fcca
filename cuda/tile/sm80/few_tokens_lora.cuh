// LoRA in the forward for few tokens: h = factor · mask(x) · lora_aᵀ and y += h · lora_bᵀ. A sum over k can be split,
// so each CTA computes h for its slice of k alone and multiplies that partial h by lora_b. The partial h stays in
// float32, so no part is rounded.
//
// For h, lora_a's ranks are the rows of the mma and the tokens are its columns. A unit has two segments: each of the
// kWarpsN warps that divide the rows of w computes h over one of them.
#pragma once

#include <cstdint>

#include "cuda/ptx/hold.cuh"
#include "cuda/ptx/load.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/mma_tf32.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/tile/generic/arch_limits.cuh"
#include "cuda/tile/generic/dropout.cuh"
#include "cuda/tile/generic/element.cuh"
#include "cuda/tile/generic/lora_step.cuh"
#include "cuda/tile/sm80/few_tokens_tile.cuh"

namespace qlora::tile {

// 32-bit indices count lora_a in chunks of 8 elements. They suffice for k below this limit and up to 32 ranks.
inline constexpr int64_t kMostFoldedK = int64_t{1} << 30;

template <class T>
struct FewTokensLora {
  const T* a;                   // [rank, k], or null if h is given
  const T* h;                   // [m, rank]
  const T* b;                   // [n, rank]
  int64_t rank, adapter_ranks;  // as in LoraOperands
  float factor;                 // scaling times dropout's keep_scale
  Dropout dropout;

  __device__ __forceinline__ int folded_ranks() const { return a == nullptr ? 0 : static_cast<int>(rank); }
};

// The warp's part of h, 16 ranks at a time. A lane holds ranks g and g + 8 of tokens 2t and 2t + 1 of every 8.
template <class Tile>
class HSums {
 public:
  using T = typename Tile::T;
  static constexpr int kRankTiles = Tile::kFoldedRanks / 16;

  // The slice begins at segment `segment0` of k and has `segments` segments. This warp computes the segment with index
  // `part` of each unit.
  __device__ __forceinline__ HSums(const FewTokensLora<T>& lora, int64_t k, int64_t segment0, int segments, int tokens,
                                   int part)
      : lora_(lora),
        k_(k),
        k0_(segment0 * kSegment + 8 * t()),
        last_(segments - 1),
        tokens_left_(tokens - g()),
        x_offset_(Tile::x_offset(g(), part, t())) {
    // Ranks beyond the last repeat the last one. Their sums are only ever multiplied by zeros.
    ranks_ = lora.folded_ranks();
    ptx::hold(ranks_), ptx::hold(x_offset_);
#pragma unroll
    for (int i = 0; i < 2 * kRankTiles; ++i) {
      chunk_[i] = static_cast<uint32_t>((min(8 * i + g(), ranks_ - 1) * k + k0_) / 8);
      ptx::hold(chunk_[i]);
    }
  }

  // Starts loading lora_a for a segment. Past the slice x is zero, so the last segment is loaded again.
  __device__ __forceinline__ void load(int segment) {
    const uint4* const from = reinterpret_cast<const uint4*>(lora_.a) + min(segment, last_) * 8;
    unroll<2 * kRankTiles>([&](auto i) {
      if (16 * (i / 2) >= ranks_) return;
      a_[i][0] = __ldg(from + chunk_[i]);
      a_[i][1] = __ldg(from + chunk_[i] + 4);
    });
  }

  // Multiplies the loaded lora_a by x. The segment's unit of x begins at `x`.
  __device__ __forceinline__ void multiply(uint32_t x, int segment) {
    if (ranks_ == 0) return;
    const uint32_t from = x + x_offset_;
    unroll<kTokenTiles>([&](auto j) {
      unroll<2>([&](auto i) {  // chunks t and t + 4
        uint4 v = make_uint4(0, 0, 0, 0);
        if (8 * j < tokens_left_) v = ptx::load_shared_v4<8 * j * kPairTableEntryBytes>(from ^ (i * 64));
        if (lora_.dropout.active()) {
          const int64_t index = (8 * j + g()) * k_ + k0_ + int64_t{segment} * kSegment + 32 * i;
          v = keep_8(v, keep_mask(lora_.dropout, index));
        }
        unroll<kRankTiles>([&](auto r) {
          if (16 * r >= ranks_) return;
          const uint4 &low = a_[2 * r][i], &high = a_[2 * r + 1][i];
          ptx::mma_m16n8k16<T>(sum_[r][j], low.x, high.x, low.y, high.y, v.x, v.y);
          ptx::mma_m16n8k16<T>(sum_[r][j], low.z, high.z, low.w, high.w, v.z, v.w);
        });
      });
    });
  }

  // Stores the sums at `to` as [token][rank].
  __device__ __forceinline__ void store(uint32_t to) const {
    const unsigned thread = thread_index();
    to += (2 * (thread % 4) * Tile::kHSumStride + thread % 32 / 4) * 4;
    unroll<kRankTiles>([&](auto i) {
      unroll<kTokenTiles>([&](auto j) {
        unroll<4>([&](auto c) {
          ptx::store_shared_f32<((8 * j + c % 2) * Tile::kHSumStride + 16 * i + c / 2 * 8) * 4>(to, sum_[i][j][c]);
        });
      });
    });
  }

 private:
  static constexpr int kTokenTiles = Tile::kHSumTokens / 8;

  __device__ __forceinline__ static int g() { return threadIdx.x % 32 / 4; }
  __device__ __forceinline__ static int t() { return threadIdx.x % 4; }

  const FewTokensLora<T>& lora_;
  int64_t k_, k0_;
  int last_, tokens_left_, ranks_;  // the last segment; the tokens from g on; the ranks
  uint32_t x_offset_;
  uint32_t chunk_[2 * kRankTiles];  // the index of lora_a's chunk t of the slice's first segment, for ranks 8i + g
  uint4 a_[2 * kRankTiles][2];      // chunks t and t + 4
  float sum_[kRankTiles][kTokenTiles][4] = {};
};

// Adds up the warps' sums at `sums`. The result is split into two tf32 numbers, which together keep 22 bits of h: the
// upper part replaces the first warp's sums, and the remainder replaces the second warp's. The caller synchronizes
// before and after.
template <class Tile>
__device__ __forceinline__ void sum_h(uint32_t sums, int tokens, int ranks, float factor) {
  // A warp takes 8 ranks of every second token among 8, and those tokens lie 8 banks apart.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int token = warp / 4 * 8 + lane / 8 * 2 + warp / 2 % 2;
  static_assert(Tile::kThreads / 16 >= Tile::kTokens);
  if (token >= tokens) return;
  for (int rank = warp % 2 * 8 + lane % 8; rank < (ranks + 15) / 16 * 16; rank += 16) {
    const uint32_t at = sums + (token * Tile::kHSumStride + rank) * 4;
    float sum = 0.0f;
    unroll<Tile::kThreads / 32>([&](auto warp) { sum += ptx::load_shared_f32<warp * Tile::kHSumBytes>(at); });
    sum *= factor;
    const float high = ptx::truncate_tf32(sum);
    ptx::store_shared_f32(at, high);
    ptx::store_shared_f32<Tile::kHSumBytes>(at, fabsf(sum) < INFINITY ? ptx::truncate_tf32(sum - high) : 0.0f);
  }
}

// Adds h · lora_bᵀ to 16 rows of y, for the ranks 16 step .. 16 step + 15. Column 2 token of the mma is the upper part
// of h[token], and column 2 token + 1 is the lower part. h4(token, rank, part) returns 4 ranks.
template <class Tile, class H>
__device__ __forceinline__ void add_h_step(const uint2 (&b)[2], int tokens, int64_t step, const H& h4,
                                           float (&acc)[Tile::kTokenTiles][2]) {
  using T = typename Tile::T;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const float2 b0 = ptx::unpack2<T>(b[0].x), b1 = ptx::unpack2<T>(b[1].x);
  const float2 b2 = ptx::unpack2<T>(b[0].y), b3 = ptx::unpack2<T>(b[1].y);
  unroll<Tile::kTokenTiles>([&](auto j) {
    const int token = 4 * j + g / 2;
    float4 h = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (token < tokens) h = h4(token, 16 * step + 4 * t, g % 2);
    float sum[4] = {};
    ptx::mma_m16n8k8_tf32(sum, b0.x, b1.x, b0.y, b1.y, h.x, h.y);
    ptx::mma_m16n8k8_tf32(sum, b2.x, b3.x, b2.y, b3.y, h.z, h.w);
    acc[j][0] += sum[0] + sum[1];
    acc[j][1] += sum[2] + sum[3];
  });
}

// Loads lora_b of rows row0 + g and row0 + g + 8, for the ranks 16 step + 4t .. 16 step + 4t + 3.
template <class T>
__device__ __forceinline__ void load_lora_b(const FewTokensLora<T>& lora, int64_t row0, int64_t n, int64_t step,
                                            uint2 (&b)[2]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const bool vector = lora.rank % 4 == 0 && (reinterpret_cast<uintptr_t>(lora.b) & 7) == 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = row0 + 8 * i + g, first = 16 * step + 4 * t;
    const T* of = lora.b + row * lora.rank;
    b[i] = vector ? load_4_ranks<T, true, true>(of, first, lora.rank, row < n)
                  : load_4_ranks<T, false, true>(of, first, lora.rank, row < n);
  }
}

// Prefetches lora_b of the CTA's rows from row0 on into L2. The kernel needs them at its very end.
template <class T>
__device__ __forceinline__ void prefetch_lora_b(const FewTokensLora<T>& lora, int64_t row0, int64_t n) {
  const int64_t row = row0 + threadIdx.x;
  if (lora.rank > 0 && threadIdx.x < FewTokensTile<T, 1>::kRows && row < n) ptx::prefetch_l2(lora.b + row * lora.rank);
}

}  // namespace qlora::tile
