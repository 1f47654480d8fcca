// out = round(mask ∘ (lora.left · lora.right) · keep_scale + main.left · main.right + bias): a GEMM of 16-bit operands
// on tensor cores. It multiplies by a panel of the decoded weight: `main` is x and rows of w for the forward, and dy
// and columns of w for dX; `lora` is h and lora_b, or g and lora_a. All sums stay in the float32 accumulators.
// cuda/tile/sm80/gemm_tile.cuh describes the tile.
//
// A CTA runs through the stages of `lora` and then through those of `main`. LoRA comes first so that dropout can mask
// its product in the accumulators. Copies are four stages ahead, and operands one mma step ahead.
//
// The sums of some tiles are cut into parts, because whole tiles would leave SMs idle (cuda/tuning/gemm.h says which).
// Each part is a unit of work, like a whole tile. It is summed from zero, and the CTA that finishes a tile's last part
// adds all of them in the order of k. So the bits depend on the cuts alone, and not on how many CTAs take the units, or
// in which order.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpp/format/philox.h"
#include "cuda/ptx/address.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/hold.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/store.cuh"
#include "cuda/tile/generic/dropout.cuh"
#include "cuda/tile/generic/element.cuh"
#include "cuda/tile/generic/split.cuh"
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

// The units of work of a launch: first the whole tiles, then the parts of the others, tile by tile.
struct GemmUnits {
  unsigned count;
  unsigned token_tiles;
  unsigned whole, cut;  // column tiles whose sums are whole, and the following ones, whose sums are cut
  unsigned parts;       // of a cut sum
  int part_stages;      // stages of `main` in a part
  float4* partials;     // [cut tiles][parts][32][threads]: as the threads hold them
  uint32_t* tickets;    // [cut tiles], zero when the kernel starts
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
  GemmUnits units;
};

// A unit: a part of a tile's sum, or all of it. Registers are scarce, so that only its number is held, and the rest is
// computed anew wherever it is needed.
struct GemmUnit {
  int64_t token0, column0;
  unsigned cut_tile = 0, part = 0;  // of a tile whose sum is cut
  bool is_cut;

  __device__ __forceinline__ GemmUnit(const GemmUnits& units, unsigned index) {
    ptx::hold(index);
    const unsigned whole = units.whole * units.token_tiles;
    is_cut = index >= whole;
    unsigned token_tile, column_tile;
    if (is_cut) {
      cut_tile = (index - whole) / units.parts;
      part = (index - whole) % units.parts;
      token_tile = cut_tile / units.cut;
      column_tile = units.whole + cut_tile % units.cut;
    } else {
      token_tile = index / units.whole;
      column_tile = index % units.whole;
    }
    token0 = int64_t{token_tile} * tile::kGemmTokens;
    column0 = int64_t{column_tile} * tile::kGemmColumns;
  }

  // The first of its stages of `main`.
  __device__ __forceinline__ int first_stage(const GemmUnits& units) const {
    return static_cast<int>(part) * units.part_stages;
  }
};

// Starts the copies of a unit, one stage after another: `lora_stages` of `lora`, and then those of `main`.
template <class T, bool kRightHasRows>
class GemmStages {
 public:
  __device__ __forceinline__ GemmStages(const GemmArgs<T>& args, unsigned unit, int lora_stages, int stages)
      : args_(args), unit_(unit), lora_stages_(lora_stages), stages_(stages) {
    if (lora_stages > 0) begin(args.lora, GemmUnit(args.units, unit));
  }

  // The number of the stage counts up from 0. After the last one nothing is copied, but a group is still committed for
  // the wait.
  __device__ __forceinline__ void fetch(uint32_t stage, int number) {
    if (number < stages_) {
      if (number == lora_stages_) {
        const GemmUnit unit(args_.units, unit_);
        begin(args_.main, unit);
        left_copier_.skip(unit.first_stage(args_.units));
        right_copier_.skip(unit.first_stage(args_.units));
      }
      left_copier_.copy(stage);
      right_copier_.copy(stage + tile::kGemmLeftBytes);
    }
    ptx::cp_async_commit();
  }

 private:
  using RightLines = tile::GemmLineCopier<T, tile::kGemmColumns>;
  using RightRows = tile::GemmRowCopier<T>;

  __device__ __forceinline__ void begin(const GemmFactors<T>& of, const GemmUnit& unit) {
    left_copier_.begin(of.left, unit.token0, args_.m, of.terms);
    if constexpr (kRightHasRows)
      right_copier_.begin(of.right, unit.column0, args_.columns, of.right_stride, of.terms);
    else
      right_copier_.begin(of.right, unit.column0, args_.columns, of.terms);
  }

  const GemmArgs<T>& args_;
  unsigned unit_;
  int lora_stages_, stages_;
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

// Writes a warp's sums of a part to the workspace, and returns whether this CTA was the tile's last. Then the sums are
// those of all parts, added in their order.
__device__ __forceinline__ bool add_parts(const GemmUnits& units, const GemmUnit& unit, GemmSums& sums) {
  constexpr int kPartQuads = tile::kGemmTokens * tile::kGemmColumns / 4;
  float4* const first = units.partials + int64_t{unit.cut_tile} * units.parts * kPartQuads + threadIdx.x;
  float4* const own = first + unit.part * kPartQuads;
  const auto each = [&](const auto& use) {
    tile::unroll<4>(
        [&](auto i) { tile::unroll<8>([&](auto j) { use(sums[i][j], (8 * i + j) * tile::kGemmThreads); }); });
  };
  each([&](float (&sum)[4], int at) { own[at] = make_float4(sum[0], sum[1], sum[2], sum[3]); });
  if (!tile::arrives_last(units.tickets + unit.cut_tile, units.parts)) return false;
  each([&](float (&sum)[4], int at) {
    const float4 part = __ldcg(first + at);
    sum[0] = part.x, sum[1] = part.y, sum[2] = part.z, sum[3] = part.w;
  });
#pragma unroll 1
  for (unsigned i = 1; i < units.parts; ++i) {
    each([&](float (&sum)[4], int at) {
      const float4 part = __ldcg(first + i * kPartQuads + at);
      sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
    });
  }
  return true;
}

// kCutsSums: whether sums may be cut.
template <class T, bool kRightHasRows, bool kCutsSums = true>
__device__ __forceinline__ void compute_unit(const GemmArgs<T>& args, unsigned index, uint32_t shared) {
  const int warp = threadIdx.x / 32, warp_token = warp / 4 * tile::kGemmWarp, warp_column = warp % 4 * tile::kGemmWarp;
  const auto stages_of = [](int64_t terms) {
    return static_cast<int>((terms + tile::kGemmTerms - 1) / tile::kGemmTerms);
  };
  int lora_stages = 0, stages = stages_of(args.main.terms);
  {
    const GemmUnit unit(args.units, index);
    if (unit.is_cut) stages = min(stages - unit.first_stage(args.units), args.units.part_stages);
    if (unit.part == 0) lora_stages = stages_of(args.lora.terms);
    stages += lora_stages;
  }

  GemmStages<T, kRightHasRows> copies(args, index, lora_stages, stages);
#pragma unroll 1
  for (int slot = 0; slot < tile::kGemmStages; ++slot) copies.fetch(shared + slot * tile::kGemmStageBytes, slot);
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
      copies.fetch(slot, stage + tile::kGemmStages);
      // After the last stage, the same one is loaded again and not used.
      if (stage + 1 < stages)
        slot = slot == shared + (tile::kGemmStages - 1) * tile::kGemmStageBytes ? shared : slot + tile::kGemmStageBytes;
      lane.template load<0>(slot, operands[0]);
      add_step<T>(operands[1], sums);
    }
    if (end == stages) break;
    if (args.dropout.active() && end > 0) {
      const GemmUnit unit(args.units, index);
      apply_dropout(args.dropout, unit.token0 + warp_token, args.first_column + unit.column0 + warp_column,
                    args.out_stride, sums);
    }
  }
  const GemmUnit unit(args.units, index);
  if constexpr (kCutsSums)
    if (unit.is_cut && !add_parts(args.units, unit, sums)) return;
  __syncthreads();
  store_sums(args, unit.token0 + warp_token, unit.column0 + warp_column,
             shared + warp * tile::kGemmWarp * tile::kGemmWarp * 2, sums);
}

// Grid: x over CTAs, each of which takes every gridDim.x-th unit.
template <class T, bool kRightHasRows>
__global__ void __launch_bounds__(tile::kGemmThreads, 1) linear_gemm_kernel(const __grid_constant__ GemmArgs<T> args) {
  extern __shared__ __align__(128) uint8_t shared_memory[];
  const uint32_t shared = ptx::shared_address(shared_memory);
#pragma unroll 1
  for (unsigned index = blockIdx.x;;) {
    compute_unit<T, kRightHasRows>(args, index, shared);
    if (args.units.count - index <= gridDim.x) break;
    index += gridDim.x;
    __syncthreads();  // the next unit's stages overwrite the sums
  }
}

}  // namespace qlora::kernels
