// out = round(mask ∘ (lora.left · lora.right) · keep_scale + main.left · main.right + bias): a GEMM of 16-bit operands
// on tensor cores. It multiplies by a panel of the decoded weight: `main` is x and rows of w for the forward, and dy
// and columns of w for dX; `lora` is h and lora_b, or g and lora_a. All sums stay in the float32 accumulators.
// cuda/tile/sm80/gemm_tile.cuh describes the tile.
//
// A CTA runs through the stages of `lora` and then through those of `main`. LoRA comes first so that dropout can mask
// its product in the accumulators. Copies are four stages ahead, and operands one mma step ahead.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpp/format/philox.h"
#include "cuda/ptx/address.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/store.cuh"
#include "cuda/tile/generic/dropout.cuh"
#include "cuda/tile/generic/element.cuh"
#include "cuda/tile/generic/unroll.cuh"
#include "cuda/tile/sm80/gemm_tile.cuh"

namespace qlora::kernels {

// left [m, terms] and right [columns, terms] or, if it has rows of terms, [terms, columns] with rows `right_stride`
// elements apart.
template <class T>
struct GemmFactors {
  const T* left;
  const T* right;
  int64_t right_stride;
  int64_t terms;  // 0: no product
};

template <class T>
struct GemmArgs {
  GemmFactors<T> lora, main;
  const T* bias;  // [columns] or null
  T* out;         // [m, columns], rows `out_stride` apart
  int64_t out_stride;
  int64_t m, columns;
  Dropout dropout;       // applies to LoRA's product
  int64_t first_column;  // where `out` begins in the rows, out_stride wide, that number the mask
};

// Starts the copies of one stage after another.
template <class T, bool kRightHasRows>
class GemmStages {
 public:
  __device__ __forceinline__ GemmStages(const GemmArgs<T>& args, int64_t token0, int64_t column0, int lora_stages,
                                        int stages)
      : args_(args), token0_(token0), column0_(column0), to_main_(lora_stages), left_(stages) {
    if (lora_stages > 0) begin(args.lora);
  }

  // Without a stage left nothing is copied, but a group is still committed for the wait.
  __device__ __forceinline__ void fetch(uint32_t stage) {
    if (left_-- > 0) {
      if (to_main_-- == 0) begin(args_.main);
      left_copier_.copy(stage);
      right_copier_.copy(stage + tile::kGemmLeftBytes);
    }
    ptx::cp_async_commit();
  }

 private:
  using RightLines = tile::GemmLineCopier<T, tile::kGemmColumns>;
  using RightRows = tile::GemmRowCopier<T>;

  __device__ __forceinline__ void begin(const GemmFactors<T>& of) {
    left_copier_.begin(of.left, token0_, args_.m, of.terms);
    if constexpr (kRightHasRows)
      right_copier_.begin(of.right, column0_, args_.columns, of.right_stride, of.terms);
    else
      right_copier_.begin(of.right, column0_, args_.columns, of.terms);
  }

  const GemmArgs<T>& args_;
  int64_t token0_, column0_;
  int to_main_, left_;  // stages until `main` begins, and until its end
  tile::GemmLineCopier<T, tile::kGemmTokens> left_copier_;
  std::conditional_t<kRightHasRows, RightRows, RightLines> right_copier_;
};

// A warp's sums: of tiles of 16 tokens x 8 columns.
using GemmSums = float[4][8][4];

template <class T>
__device__ __forceinline__ void add_step(const tile::GemmOperands& of, GemmSums& sums) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t* const a = of.left[i];
      const uint32_t* const b = of.right[j / 2] + j % 2 * 2;
      ptx::mma_m16n8k16<T>(sums[i][j], a[0], a[1], a[2], a[3], b[0], b[1]);
    }
  }
}

// Applies dropout to sums whose first token and column are given. A Philox number serves 4 neighbouring columns, those
// of two lanes. So each lane draws for one of its two tokens and gets the other mask from its neighbour.
__device__ __forceinline__ void apply_dropout(const Dropout& dropout, int64_t token, int64_t column, int64_t stride,
                                              GemmSums& sums) {
  const float keep_scale = static_cast<float>(dropout.keep_scale);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int64_t first = (token + g + t % 2 * 8) * stride + column + t / 2 * 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t own = 0;  // bit 4 j + c: column c of the four in tile j
#pragma unroll 1
    for (int j = 0; j < 8; ++j) own |= tile::keep_mask<4>(dropout, first + i * 16 * stride + 8 * j) << (4 * j);
    const uint32_t other = __shfl_xor_sync(~0u, own, 1);
    const uint32_t low = (t % 2 == 0 ? own : other) >> t % 2 * 2, high = (t % 2 == 0 ? other : own) >> t % 2 * 2;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const uint32_t keep = q < 2 ? low : high;
        sums[i][j][q] = keep >> (4 * j + q % 2) & 1 ? sums[i][j][q] * keep_scale : 0.0f;
      }
    }
  }
}

// Adds the bias, rounds, and writes a warp's outputs in pieces of 16 bytes by way of its 8 KB of shared memory, in
// which chunk c of token i is stored at chunk c ^ i % 8.
template <class T>
__device__ __forceinline__ void store_sums(const GemmArgs<T>& args, int64_t token0, int64_t column0, uint32_t shared,
                                           const GemmSums& sums) {
  constexpr int kTokenBytes = tile::kGemmWarp * 2;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t own = shared + g * kTokenBytes + 4 * t;
  tile::unroll<8>([&](auto j) {
    float2 bias = make_float2(0.0f, 0.0f);
    const int64_t column = column0 + 8 * j + 2 * t;
    if (args.bias != nullptr) {
      if (column < args.columns) bias.x = tile::widen(args.bias[column]);
      if (column + 1 < args.columns) bias.y = tile::widen(args.bias[column + 1]);
    }
    const uint32_t to = own + ((j ^ g) << 4);
    tile::unroll<4>([&](auto i) {
      const float* const sum = sums[i][j];
      ptx::store_shared_u32<i * 16 * kTokenBytes>(to, ptx::pack2<T>(sum[0] + bias.x, sum[1] + bias.y));
      ptx::store_shared_u32<(i * 16 + 8) * kTokenBytes>(to, ptx::pack2<T>(sum[2] + bias.x, sum[3] + bias.y));
    });
  });
  __syncwarp();
  const int64_t column = column0 + 8 * (lane % 8);
  const int columns = static_cast<int>(max(min(args.columns - column, int64_t{8}), int64_t{0}));
#pragma unroll 1
  for (int i = lane / 8; i < tile::kGemmWarp && token0 + i < args.m; i += 4) {
    const uint4 v = ptx::load_shared_v4(shared + i * kTokenBytes + ((lane % 8 ^ i % 8) << 4));
    T* const out = args.out + (token0 + i) * args.out_stride + column;
    if (columns == 8 && args.out_stride % 8 == 0) {
      ptx::store_stream_v4(out, v);
    } else {
      const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int c = 0; c < 8; ++c)
        if (c < columns) out[c].bits = static_cast<uint16_t>(word[c / 2] >> 16 * (c % 2));
    }
  }
}

// Grid: x over tiles, of all columns of 128 tokens first.
template <class T, bool kRightHasRows>
__global__ void __launch_bounds__(tile::kGemmThreads, 1) linear_gemm_kernel(const __grid_constant__ GemmArgs<T> args) {
  extern __shared__ __align__(128) uint8_t shared_memory[];
  const uint32_t shared = ptx::shared_address(shared_memory);
  const uint32_t column_tiles = static_cast<uint32_t>((args.columns - 1) / tile::kGemmColumns + 1);
  const int64_t token0 = int64_t{blockIdx.x / column_tiles} * tile::kGemmTokens;
  const int64_t column0 = int64_t{blockIdx.x % column_tiles} * tile::kGemmColumns;
  const int warp = threadIdx.x / 32, warp_token = warp / 4 * tile::kGemmWarp, warp_column = warp % 4 * tile::kGemmWarp;
  const auto stages_of = [](int64_t terms) {
    return static_cast<int>((terms + tile::kGemmTerms - 1) / tile::kGemmTerms);
  };
  const int lora_stages = stages_of(args.lora.terms), stages = lora_stages + stages_of(args.main.terms);

  GemmStages<T, kRightHasRows> copies(args, token0, column0, lora_stages, stages);
#pragma unroll 1
  for (int slot = 0; slot < tile::kGemmStages; ++slot) copies.fetch(shared + slot * tile::kGemmStageBytes);
  const tile::GemmLane<kRightHasRows> lane(warp_token, warp_column, threadIdx.x % 32);
  GemmSums sums = {};
  tile::GemmOperands operands[2];
  ptx::cp_async_wait<tile::kGemmStages - 1>();
  __syncthreads();
  lane.template load<0>(shared, operands[0]);
  int stage = 0;
  uint32_t slot = shared;
#pragma unroll 1
  for (int end = lora_stages;; end = stages) {
#pragma unroll 1
    for (; stage < end; ++stage) {
      lane.template load<1>(slot, operands[1]);
      add_step<T>(operands[0], sums);
      ptx::cp_async_wait<tile::kGemmStages - 2>();
      __syncthreads();  // the next stage is there, and all warps have loaded this one
      copies.fetch(slot);
      // After the last stage, the same one is loaded again and not used.
      if (stage + 1 < stages)
        slot = slot == shared + (tile::kGemmStages - 1) * tile::kGemmStageBytes ? shared : slot + tile::kGemmStageBytes;
      lane.template load<0>(slot, operands[0]);
      add_step<T>(operands[1], sums);
    }
    if (end == stages) break;
    if (args.dropout.active() && lora_stages > 0)
      apply_dropout(args.dropout, token0 + warp_token, args.first_column + column0 + warp_column, args.out_stride,
                    sums);
  }
  __syncthreads();
  store_sums(args, token0 + warp_token, column0 + warp_column, shared + warp * tile::kGemmWarp * tile::kGemmWarp * 2,
             sums);
}

}  // namespace qlora::kernels
