// The epilogue of the forward's tile. It adds the sums of the warp groups, then those of the CTAs that split k, then
// the bias, rounds once, and stores. The order of the additions is fixed, so the bits do not depend on which CTA
// finishes first.
#pragma once

#include <cstdint>

#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/store.cuh"
#include "cuda/tile/generic/arch_limits.cuh"
#include "cuda/tile/generic/cluster_sum.cuh"
#include "cuda/tile/generic/element.cuh"
#include "cuda/tile/generic/split.cuh"
#include "cuda/tile/generic/unroll.cuh"
#include "cuda/tile/sm80/k_slices.cuh"
#include "cuda/tile/sm80/linear_tile.cuh"

namespace qlora::tile {

template <class T>
struct LinearOutput {
  T* y;           // [m, n]
  const T* bias;  // [n] or null
  // Used only if several CTAs that are not a cluster divide the sum of a tile.
  float* partials;    // [tiles][parts][kTokens][kRows]
  uint32_t* tickets;  // [tiles], zero when the kernel starts; null for a cluster
};

// Stores a warp's accumulators to shared memory as [group][token][row].
template <class Tile>
__device__ __forceinline__ void store_sums(uint32_t shared, int warp_row, int group,
                                           const float (&acc)[Tile::kRowTiles][Tile::kTokenTiles][4]) {
  const auto thread = thread_index();
  const int g = thread % 32 / 4, t = thread % 4;
  const uint32_t address = shared + ((group * Tile::kTokens + 2 * t) * Tile::kSumStride + warp_row + g) * 4;
  unroll<Tile::kRowTiles>([&](auto i) {
    unroll<Tile::kTokenTiles>([&](auto j) {
      unroll<4>([&](auto c) {
        constexpr int token = 8 * j + c % 2, row = 16 * i + c / 2 * 8;
        ptx::store_shared_f32<(token * Tile::kSumStride + row) * 4>(address, acc[i][j][c]);
      });
    });
  });
}

// Four neighbouring columns n..n+3 of y: a thread's share of a token's row.
template <class T>
class OutputQuad {
 public:
  __device__ __forceinline__ OutputQuad(const LinearOutput<T>& out, int64_t n, int64_t n_count)
      : y_(out.y + n), n_count_(n_count), left_(static_cast<int>(n_count - n < 4 ? n_count - n : 4)) {
    if (out.bias == nullptr) return;
    if (vector() && (reinterpret_cast<uintptr_t>(out.bias) & 7) == 0) {
      const uint2 pairs = __ldg(reinterpret_cast<const uint2*>(out.bias + n));
      const float2 low = ptx::unpack2<T>(pairs.x), high = ptx::unpack2<T>(pairs.y);
      bias_[0] = low.x, bias_[1] = low.y, bias_[2] = high.x, bias_[3] = high.y;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i < left_) bias_[i] = widen(out.bias[n + i]);
    }
  }

  __device__ __forceinline__ void store(int64_t token, float4 sum) const {
    T* const y = y_ + token * n_count_;
    if (vector()) {
      ptx::store_v2(y, make_uint2(ptx::pack2<T>(sum.x + bias_[0], sum.y + bias_[1]),
                                  ptx::pack2<T>(sum.z + bias_[2], sum.w + bias_[3])));
    } else {
      const float value[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i < left_) y[i] = narrow<T>(value[i] + bias_[i]);
    }
  }

 private:
  __device__ __forceinline__ bool vector() const { return left_ == 4 && n_count_ % 4 == 0; }

  T* y_;
  int64_t n_count_;
  int left_;  // columns that exist: fewer than four, possibly none, near and past the end
  float bias_[4] = {};
};

// Each CTA of a cluster holds the sums of its split in place of its first group's sums. The CTAs divide the tile among
// them.
template <class Tile>
__device__ __forceinline__ void finish_cluster(const LinearOutput<typename Tile::T>& out, const float* sums,
                                               int64_t token0, int tokens, int64_t n0, int64_t n) {
  constexpr int kQuads = Tile::kRows / 4;
  ptx::cluster_sync();
  for (unsigned i = blockIdx.y * Tile::kThreads + threadIdx.x; i < tokens * kQuads; i += gridDim.y * Tile::kThreads) {
    const int token = i / kQuads, quad = i % kQuads;
    const float4* part = reinterpret_cast<const float4*>(sums + token * Tile::kSumStride + 4 * quad);
    OutputQuad<typename Tile::T>(out, n0 + 4 * quad, n).store(token0 + token, cluster_sum(part, gridDim.y));
  }
  ptx::cluster_sync();  // no CTA ends while another reads its sums
}

// `sums` holds the output of store_sums. A thread adds up and stores four columns of every kTokenStep-th token.
template <class Tile, class Slice>
__device__ __forceinline__ void finish(const LinearOutput<typename Tile::T>& out, const Slice& slice, float* sums,
                                       int64_t token0, int64_t m, int64_t n0, int64_t n) {
  constexpr int kQuads = Tile::kRows / 4, kTokenStep = Tile::kThreads / kQuads;
  static_assert(Tile::kThreads % kQuads == 0);
  const auto thread = thread_index();
  const int quad = thread % kQuads, first = thread / kQuads;
  const int tokens = static_cast<int>(m - token0 < Tile::kTokens ? m - token0 : Tile::kTokens);

  const auto group_sum = [&](int token) {
    const float* source = sums + token * Tile::kSumStride + 4 * quad;
    float4 sum = *reinterpret_cast<const float4*>(source);
#pragma unroll
    for (int group = 1; group < Tile::kWarpsK; ++group)
      sum = add(sum, *reinterpret_cast<const float4*>(source + group * (Tile::kTokens * Tile::kSumStride)));
    return sum;
  };
  const auto store_all = [&](auto sum_of) {
    if (first >= tokens) return;
    const OutputQuad<typename Tile::T> output(out, n0 + 4 * quad, n);
    for (int token = first; token < tokens; token += kTokenStep) output.store(token0 + token, sum_of(token));
  };
  const KPart part = slice.part();
  if (part.count == 1) return store_all(group_sum);
  if constexpr (Slice::kMayBeCluster)
    if (out.tickets == nullptr) {
      for (int token = first; token < tokens; token += kTokenStep)
        *reinterpret_cast<float4*>(sums + token * Tile::kSumStride + 4 * quad) = group_sum(token);
      return finish_cluster<Tile>(out, sums, token0, tokens, n0, n);
    }

  constexpr int kPartQuads = Tile::kTokens * kQuads;
  float4* const partials = reinterpret_cast<float4*>(out.partials) + slice.first_part() * kPartQuads + quad;
  for (int token = first; token < tokens; token += kTokenStep)
    partials[part.index * kPartQuads + token * kQuads] = group_sum(token);
  uint32_t* const ticket = out.tickets + slice.tile();
  if constexpr (Tile::kInTable) {  // the tile leaves no room for a static variable
    if (!arrives_last(ticket, part.count, reinterpret_cast<uint32_t*>(sums) + Tile::kSumBytes / 4)) return;
  } else {
    if (!arrives_last(ticket, part.count)) return;
  }
  store_all([&](int token) {
    const float4* source = partials + token * kQuads;
    float4 sum = __ldcg(source);
    for (unsigned i = 1; i < part.count; ++i) sum = add(sum, __ldcg(source + i * kPartQuads));
    return sum;
  });
}

}  // namespace qlora::tile
