// y = x · wᵀ + h · lora_bᵀ + bias in float32 throughout: the path of float32 x, and of every shape and alignment that
// the tensor-core kernel does not take (blocks and bytes that span rows, blocks of 32, odd k). Each element of w is
// found by its flat index, so nothing is assumed of k or of pointers.
//
// A CTA computes kRows rows of w times kTokens tokens; both operands are widened to float32 in shared memory, 32 k at a
// time. Each 32 k are summed from zero and then added, which keeps the rounding error of long sums small.
#pragma once

#include <cstdint>

#include "cuda/tile/block_scale.cuh"
#include "cuda/tile/element.cuh"

namespace qlora::kernels {

template <class T>
struct ExactLinearArgs {
  const T* x;
  const uint8_t* packed;
  tile::ScaleView scales;
  int64_t m, n, k;
  const T* h;       // [m, rank]
  const T* lora_b;  // [n, rank]
  int64_t rank;     // 0: none
  const T* bias;    // [n] or null
  T* y;             // [m, n]
  int64_t token_tiles;
};

inline constexpr int kExactRows = 64;
inline constexpr int kExactThreads = 256;
inline constexpr int kExactStageK = 32;

// Thread (column, line) computes rows column + 16 i and tokens line + 16 j of the tile.
template <class T, int kTokens>
__global__ void __launch_bounds__(kExactThreads) linear_nf4_exact_kernel(const __grid_constant__ ExactLinearArgs<T> p) {
  constexpr int kRowsEach = kExactRows / 16, kTokensEach = kTokens / 16;
  __shared__ float dynamic8[256], code[kCodes];
  __shared__ float w_stage[kExactStageK][kExactRows + 1], x_stage[kExactStageK][kTokens + 1];
  const int column = threadIdx.x % 16, line = threadIdx.x / 16;
  const int64_t n0 = blockIdx.x / p.token_tiles * kExactRows, token0 = blockIdx.x % p.token_tiles * kTokens;

  tile::fill_dynamic8<kExactThreads>(dynamic8);
  if (threadIdx.x < kCodes) code[threadIdx.x] = tile::c_nf4.value[threadIdx.x];
  const float offset = tile::nested_offset(p.scales);

  float acc[kRowsEach][kTokensEach] = {};
  // acc += sum over k < count of w(row, k) · x(token, k)
  const auto accumulate = [&](int64_t count, auto w, auto x) {
    for (int64_t k0 = 0; k0 < count; k0 += kExactStageK) {
      __syncthreads();
      const int k = threadIdx.x % kExactStageK;
      const bool valid = k0 + k < count;
      for (int row = threadIdx.x / kExactStageK; row < kExactRows; row += kExactThreads / kExactStageK)
        w_stage[k][row] = valid && n0 + row < p.n ? w(n0 + row, k0 + k) : 0.0f;
      for (int token = threadIdx.x / kExactStageK; token < kTokens; token += kExactThreads / kExactStageK)
        x_stage[k][token] = valid && token0 + token < p.m ? x(token0 + token, k0 + k) : 0.0f;
      __syncthreads();
      float sum[kRowsEach][kTokensEach] = {};
#pragma unroll 8
      for (int i = 0; i < kExactStageK; ++i) {
        float a[kRowsEach], b[kTokensEach];
#pragma unroll
        for (int r = 0; r < kRowsEach; ++r) a[r] = w_stage[i][column + 16 * r];
#pragma unroll
        for (int c = 0; c < kTokensEach; ++c) b[c] = x_stage[i][line + 16 * c];
#pragma unroll
        for (int r = 0; r < kRowsEach; ++r)
#pragma unroll
          for (int c = 0; c < kTokensEach; ++c) sum[r][c] = fmaf(a[r], b[c], sum[r][c]);
      }
#pragma unroll
      for (int r = 0; r < kRowsEach; ++r)
#pragma unroll
        for (int c = 0; c < kTokensEach; ++c) acc[r][c] += sum[r][c];
    }
  };

  accumulate(
      p.k,
      [&](int64_t n, int64_t k) {
        const int64_t i = n * p.k + k;
        const tile::RawScale raw = tile::load_scale(p.scales, i >> p.scales.block_shift);
        return code[nf4_code_at(p.packed, i)] * tile::decode_scale(p.scales, raw, dynamic8, offset);
      },
      [&](int64_t token, int64_t k) { return tile::widen(p.x[token * p.k + k]); });
  accumulate(
      p.rank, [&](int64_t n, int64_t k) { return tile::widen(p.lora_b[n * p.rank + k]); },
      [&](int64_t token, int64_t k) { return tile::widen(p.h[token * p.rank + k]); });

#pragma unroll
  for (int r = 0; r < kRowsEach; ++r) {
    const int64_t n = n0 + column + 16 * r;
    if (n >= p.n) continue;
    const float bias = p.bias != nullptr ? tile::widen(p.bias[n]) : 0.0f;
#pragma unroll
    for (int c = 0; c < kTokensEach; ++c) {
      const int64_t token = token0 + line + 16 * c;
      if (token < p.m) p.y[token * p.n + n] = tile::narrow<T>(acc[r][c] + bias);
    }
  }
}

}  // namespace qlora::kernels
