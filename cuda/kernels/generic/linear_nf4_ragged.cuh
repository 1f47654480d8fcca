// y = x · wᵀ + h · lora_bᵀ + bias for everything that the tensor-core kernel does not accept: quantization blocks and
// bytes that span rows, NF4 in blocks of fewer than 64 weights, odd k, any alignment, wide codes. The kernel finds each
// element of w by its flat index. All arithmetic is float32, so this is also the exact kernel for float32 x.
//
// A CTA computes kRaggedRows rows of w times kTokens tokens. Both operands are widened to float32 in shared memory, 32
// k at a time. A thread multiplies 4 rows by 4 tokens. With few tokens, 64 / kTokens threads divide the 32 k of the
// same outputs. Each stage is summed from zero and then added, which keeps the rounding error of long sums small.
#pragma once

#include <cstdint>

#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/tile/generic/block_scale.cuh"
#include "cuda/tile/generic/code_tables.cuh"
#include "cuda/tile/generic/element.cuh"
#include "cuda/tile/generic/wide_codes.cuh"

namespace qlora::kernels {

template <class T>
struct RaggedLinearArgs {
  const T* x;
  const uint8_t* packed;
  tile::ScaleView scales;
  tile::CodeView code;
  int64_t m, n, k;
  const T* h;       // [m, rank]
  const T* lora_b;  // [n, rank]
  int64_t rank;     // 0: none
  const T* bias;    // [n] or null
  T* y;             // [m, n]
  int64_t token_tiles;
};

inline constexpr int kRaggedRows = 64;  // of w, per CTA
inline constexpr int kRaggedThreads = 256;
inline constexpr int kRaggedStageK = 32;  // k per stage

inline constexpr int kRaggedRun = 8;  // consecutive weights that a thread decodes at once

// Decodes the weights i0..i0+kRaggedRun-1 of the flattened weight. The first `count` exist, and the others become zero.
// A complete run that begins at a multiple of its length lies in one word and one block. Otherwise each weight is
// decoded separately.
__device__ __forceinline__ void decode_run(const uint8_t* packed, const tile::ScaleView& view, int64_t i0, int count,
                                           const float* code, const float* scale_values, float offset,
                                           float (&w)[kRaggedRun]) {
  static_assert(kRaggedRun == 8, "a word");
  const auto scale_of = [&](int64_t i) { return tile::read_scale(view, i >> view.block_shift, scale_values, offset); };
  const auto block_of = [&](int64_t i, float scale) { return tile::BlockDecoder(view, i >> view.block_shift, scale); };
  const uint8_t* const bytes = packed + i0 / 2;
  if (count == kRaggedRun && i0 % kRaggedRun == 0 && (reinterpret_cast<uintptr_t>(bytes) & 3) == 0) {
    const uint32_t word = __ldg(reinterpret_cast<const uint32_t*>(bytes));
    const float scale = scale_of(i0);
    const auto value = [&](int i) { return code[word >> (i / 2 * 8 + (i % 2 ? 0 : 4)) & 15]; };
    if (view.scales.offsets) {
      const tile::BlockDecoder decode = block_of(i0, scale);
#pragma unroll
      for (int i = 0; i < kRaggedRun; ++i) w[i] = decode(value(i));
    } else {
#pragma unroll
      for (int i = 0; i < kRaggedRun; ++i) w[i] = __fmul_rn(value(i), scale);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRaggedRun; ++i) {
      w[i] = 0.0f;
      if (i >= count) continue;
      const float scale = scale_of(i0 + i), value = code[code_at(packed, i0 + i)];
      w[i] = view.scales.offsets ? block_of(i0 + i, scale)(value) : __fmul_rn(value, scale);
    }
  }
}

// The same for a wide code, whose rows consist of whole runs, and so do its blocks.
__device__ __forceinline__ void decode_wide_run(const uint8_t* packed, const tile::ScaleView& view, int64_t i0,
                                                int bits, const float* code, const float* scale_values, float offset,
                                                float (&w)[kRaggedRun]) {
  tile::WideRun<kRaggedRun> run;
  run.load(packed, i0, bits);
  const int64_t block = i0 >> view.block_shift;
  const float scale = tile::read_scale(view, block, scale_values, offset);
  tile::with_offsets(view, [&](auto has_offsets) {
    if constexpr (has_offsets)
      run.decode(w, bits, code, tile::BlockDecoder(view, block, scale));
    else
      run.decode(w, bits, code, [&](float value) { return __fmul_rn(value, scale); });
  });
}

// Computes the tile of rows n0.. of w and tokens token0.. of x. This is the work of a whole CTA.
template <class T, int kTokens, bool kWide>
__device__ __forceinline__ void linear_nf4_ragged_tile(const RaggedLinearArgs<T>& p, int64_t n0, int64_t token0) {
  constexpr int kRowThreads = kRaggedRows / 4, kTokenThreads = kTokens / 4;  // of 4 rows and 4 tokens each
  constexpr int kSlices = kRaggedThreads / (kRowThreads * kTokenThreads);    // threads that divide a stage's k
  constexpr int kSliceK = kRaggedStageK / kSlices, kRunsPerRow = kRaggedStageK / kRaggedRun;
  static_assert(kRaggedRows * kRunsPerRow == kRaggedThreads);
  __shared__ float scale_values[256], code[tile::kStagedValues<kWide>];
  __shared__ float w_stage[kRaggedStageK][kRaggedRows + 1], x_stage[kRaggedStageK][kTokens + 1];
  __shared__ float sums[kSlices][kTokens][kRaggedRows];
  const int row_thread = threadIdx.x % kRowThreads, token_thread = threadIdx.x / kRowThreads % kTokenThreads;
  const int slice = threadIdx.x / (kRowThreads * kTokenThreads);

  tile::fill_scale_values<kRaggedThreads>(p.scales, scale_values);
  tile::stage_values(code, p.code);
  const float offset = tile::nested_offset(p.scales);

  float acc[4][4] = {};  // [i][j]: row row_thread + kRowThreads i, token token_thread + kTokenThreads j
  // acc += sum over k < count of w(row, k) · x[token][k]. load_w(row, k, count, w) loads a run of consecutive k.
  const auto accumulate = [&](int64_t count, const T* x, auto load_w) {
    const int row = threadIdx.x / kRunsPerRow, run = threadIdx.x % kRunsPerRow * kRaggedRun;
    for (int64_t k0 = 0; k0 < count; k0 += kRaggedStageK) {
      __syncthreads();
      float w[kRaggedRun] = {};
      const int64_t left = n0 + row < p.n ? count - k0 - run : 0;
      if (left > 0) load_w(n0 + row, k0 + run, static_cast<int>(left < kRaggedRun ? left : kRaggedRun), w);
#pragma unroll
      for (int i = 0; i < kRaggedRun; ++i) w_stage[run + i][row] = w[i];
      for (int i = threadIdx.x; i < kTokens * kRaggedStageK; i += kRaggedThreads) {
        const int k = i % kRaggedStageK, token = i / kRaggedStageK;
        const bool valid = k0 + k < count && token0 + token < p.m;
        x_stage[k][token] = valid ? tile::widen(x[(token0 + token) * count + k0 + k]) : 0.0f;
      }
      __syncthreads();
      float sum[4][4] = {};
#pragma unroll 8
      for (int k = slice * kSliceK; k < (slice + 1) * kSliceK; ++k) {
        float a[4], b[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          a[i] = w_stage[k][row_thread + kRowThreads * i], b[i] = x_stage[k][token_thread + kTokenThreads * i];
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(a[i], b[j], sum[i][j]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[i][j] += sum[i][j];
    }
  };
  accumulate(p.k, p.x, [&](int64_t n, int64_t k, int count, float (&w)[kRaggedRun]) {
    if constexpr (kWide)
      decode_wide_run(p.packed, p.scales, n * p.k + k, p.code.wide.bits, code, scale_values, offset, w);
    else
      decode_run(p.packed, p.scales, n * p.k + k, count, code, scale_values, offset, w);
  });
  ptx::wait_for_previous_grid();  // which computes h
  accumulate(p.rank, p.h, [&](int64_t n, int64_t k, int count, float (&w)[kRaggedRun]) {
#pragma unroll
    for (int i = 0; i < kRaggedRun; ++i)
      if (i < count) w[i] = tile::widen(p.lora_b[n * p.rank + k + i]);
  });

#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[slice][token_thread + kTokenThreads * j][row_thread + kRowThreads * i] = acc[i][j];
  __syncthreads();
  for (int i = threadIdx.x; i < kTokens * kRaggedRows; i += kRaggedThreads) {
    const int64_t token = token0 + i / kRaggedRows, n = n0 + i % kRaggedRows;
    if (token >= p.m || n >= p.n) continue;
    float sum = 0.0f;
#pragma unroll
    for (int s = 0; s < kSlices; ++s) sum += sums[s][i / kRaggedRows][i % kRaggedRows];
    p.y[token * p.n + n] = tile::narrow<T>(sum + (p.bias != nullptr ? tile::widen(p.bias[n]) : 0.0f));
  }
}

template <class T, int kTokens, bool kWide>
__global__ void __launch_bounds__(kRaggedThreads)
    linear_nf4_ragged_kernel(const __grid_constant__ RaggedLinearArgs<T> p) {
  linear_nf4_ragged_tile<T, kTokens, kWide>(p, blockIdx.x / p.token_tiles * kRaggedRows,
                                            blockIdx.x % p.token_tiles * kTokens);
}

}  // namespace qlora::kernels
