// The accumulators of the tensor-core dX kernel: the products that are added to them, and the epilogue that turns them
// into dx.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/kernels/sm80/linear_nf4_dx_parts.cuh"
#include "cuda/ptx/address.cuh"
#include "cuda/ptx/hold.cuh"
#include "cuda/ptx/lop3.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/store.cuh"
#include "cuda/tile/generic/block_scale.cuh"
#include "cuda/tile/generic/dropout.cuh"
#include "cuda/tile/generic/split.cuh"
#include "cuda/tile/generic/unroll.cuh"

namespace qlora::kernels {

// Applies the scales and offsets of rows 4t..4t+3 of a step. In the regular case, a lane's eight columns lie in one
// quantization block.
template <class Layout, bool kRagged, bool kHasOffsets, bool kFused>
struct DxScales {
  float4 row, offset;
  __device__ __forceinline__ DxScales(const DxArgs& args, const DxTile& tile, char* shared, int64_t row0, int slot,
                                      int first_row) {
    const int group =
        (tile::kDxSlabColumns * tile.slab + 8 * tile.g) >> tile::dx_scale_group_shift(args.scales, args.k);
    row = *reinterpret_cast<const float4*>(shared + Layout::scale(slot, group, first_row));
    if constexpr (kHasOffsets)
      offset = *reinterpret_cast<const float4*>(shared + Layout::offset(slot, group, first_row));
  }
  template <int kColumn, int kRow>
  __device__ __forceinline__ float apply(float value) const {
    if constexpr (kHasOffsets)
      return tile::scale_and_add<kFused>(value, part<kRow>(row), part<kRow>(offset));
    else
      return value * part<kRow>(row);
  }

 private:
  template <int kRow>
  __device__ __forceinline__ static float part(float4 of) {
    return kRow == 0 ? of.x : kRow == 1 ? of.y : kRow == 2 ? of.z : of.w;
  }
};

// Offsets are read straight from global memory, because shared memory has no room for those of blocks of 16.
template <class Layout, bool kHasOffsets, bool kFused>
struct DxScales<Layout, true, kHasOffsets, kFused> {
  static_assert(!kFused);

  const char* shared;
  int slot, first_row, shift;
  uint32_t first[4];   // the lane's first column, counted from the start of the first block that its row touches
  float offset[4][2];  // of the block that holds the lane's first column, and of the next block

  __device__ __forceinline__ DxScales(const DxArgs& args, const DxTile& tile, char* shared, int64_t row0, int slot,
                                      int first_row)
      : shared(shared), slot(slot), first_row(first_row), shift(args.scales.block_shift) {
    const uint32_t in_block = (1u << shift) - 1;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t n = row0 + first_row + i;
      const uint32_t phase = static_cast<uint32_t>(n * args.k + tile.column0) & in_block;
      first[i] = phase + static_cast<uint32_t>(tile.column - tile.column0);
      if constexpr (kHasOffsets) load_offsets(args, tile, n, i);
    }
  }
  template <int kColumn, int kRow>
  __device__ __forceinline__ float apply(float value) const {
    const int group = static_cast<int>((first[kRow] + kColumn) >> shift);
    const float factor = scale(group, kRow);
    if constexpr (kHasOffsets) {
      const bool is_first = group == static_cast<int>(first[kRow] >> shift);
      return tile::scale_and_add<false>(value, factor,
                                        is_first ? offset[kRow][0] : offset[kRow][1]);  // no local memory
    } else {
      return value * factor;
    }
  }

 private:
  __device__ __forceinline__ float scale(int group, int row) const {
    return *reinterpret_cast<const float*>(shared + Layout::scale(slot, group, first_row + row));
  }

  // The offsets of rows and blocks that do not exist are 0.
  __device__ __forceinline__ void load_offsets(const DxArgs& args, const DxTile& tile, int64_t n, int row) {
    const int group = static_cast<int>(first[row] >> shift), groups = static_cast<int>((first[row] + 7) >> shift);
    const int64_t block0 = (n * args.k + tile.column0) >> shift;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t block = block0 + group + i;
      offset[row][i] = 0.0f;
      if (n < args.n && group + i <= groups && block < args.scales.blocks)
        offset[row][i] =
            tile::product_offset(args.scales, tile::load_offset(args.scales, block), scale(group + i, row));
    }
  }
};

template <class T, int kTokenTiles>
class DxAccumulators {
  // Each of a slab's two warps finishes half of the token tiles. If there is only one, the first warp finishes it.
  static constexpr int kOwners = kTokenTiles == 1 ? 1 : 2;
  static constexpr int kOwn = kTokenTiles / kOwners;

 public:
  // acc += [g | a] over `rank`, masked and scaled by dropout. Must come before any other addition.
  template <bool kRagged>
  __device__ __forceinline__ void add_lora(const DxArgs& args, const DxTile& tile, int64_t rank) {
    // Without hold(), the compiler zeroes the accumulators twice, once for each path around the loop.
#pragma unroll
    for (int i = 0; i < 4 * kTokenTiles; ++i) ptx::hold(acc_[i / kTokenTiles][i % kTokenTiles]);
#pragma unroll 1
    for (int64_t r0 = 0; r0 < rank; r0 += 16) {
      uint32_t a[4][4];  // rows r0 + 4t + i, eight columns each
#pragma unroll
      for (int i = 0; i < 4; ++i) load_a<kRagged>(args, r0 + 4 * tile.t + i, tile.column, a[i]);
      uint32_t b[kTokenTiles][2];
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        const uint2 pair = load_g(args, tile.token0 + 8 * j + tile.g, r0 + 4 * tile.t);
        b[j][0] = pair.x;
        b[j][1] = pair.y;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t a0 = ptx::prmt<0x5410>(a[0][i], a[1][i]), a1 = ptx::prmt<0x7632>(a[0][i], a[1][i]);
        const uint32_t a2 = ptx::prmt<0x5410>(a[2][i], a[3][i]), a3 = ptx::prmt<0x7632>(a[2][i], a[3][i]);
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) ptx::mma_m16n8k16<T>(acc_[i][j], a0, a1, a2, a3, b[j][0], b[j][1]);
      }
    }
    if (rank > 0 && args.dropout.active()) apply_dropout(args, tile);
  }

  // acc += [dy | w] for this warp's steps of the stage. `fused`: tile::fuses_offset.
  template <bool kRagged, bool kHasOffsets>
  __device__ __forceinline__ void add_stage(const DxArgs& args, const DxTile& tile, char* shared, int stage, int slot,
                                            bool fused) {
    using Layout = tile::DxLayout<kTokenTiles, kRagged, kHasOffsets>;
    // Calls use with the type that applies scales and offsets.
    const auto with_one = [](auto scales) { return [scales](const auto& use) { use(scales); }; };
    if constexpr (kRagged) {
      add_steps<Layout>(args, tile, shared, stage, slot, [&](const auto& use) {
        tile::with_offsets(args.scales, [&](auto has_offsets) {
          use(std::type_identity<DxScales<Layout, true, has_offsets, false>>{});
        });
      });
    } else if constexpr (kHasOffsets) {
      if (fused)
        add_steps<Layout>(args, tile, shared, stage, slot,
                          with_one(std::type_identity<DxScales<Layout, false, true, true>>{}));
      else
        add_steps<Layout>(args, tile, shared, stage, slot,
                          with_one(std::type_identity<DxScales<Layout, false, true, false>>{}));
    } else {
      add_steps<Layout>(args, tile, shared, stage, slot,
                        with_one(std::type_identity<DxScales<Layout, false, false, false>>{}));
    }
  }

  // Adds the sums of the slab's two warps and of the splits, and writes dx. Call from all threads of the CTA, with a
  // barrier after the last use of shared memory.
  template <bool kRagged>
  __device__ __forceinline__ void finish(const DxArgs& args, const DxTile& tile, char* shared) {
    float own[kOwn][4][4];
    exchange(tile, shared, own);
    const bool owns = tile.group < kOwners;
    if (args.splits > 1) {
      const int64_t warp = (int64_t{blockIdx.x} * args.splits * kOwners + tile.group) * tile::kDxSlabs + tile.slab;
      constexpr int kSplitStride = kOwners * tile::kDxSlabs * kOwn * 4 * 32;  // in float4
      float4* partial = reinterpret_cast<float4*>(args.partials) + warp * (kOwn * 4 * 32) + tile.lane;
      if (owns) {
        float4* const mine = partial + int64_t{blockIdx.y} * kSplitStride;
#pragma unroll
        for (int q = 0; q < kOwn * 4; ++q) {
          const float* v = own[q / 4][q % 4];
          mine[q * 32] = make_float4(v[0], v[1], v[2], v[3]);
        }
      }
      if (!tile::arrives_last(args.tickets + blockIdx.x, args.splits)) return;
      if (owns) {
#pragma unroll
        for (int q = 0; q < kOwn * 16; ++q) own[q / 16][q / 4 % 4][q % 4] = 0.0f;
#pragma unroll 1
        for (int split = 0; split < args.splits; ++split, partial += kSplitStride) {
#pragma unroll
          for (int q = 0; q < kOwn * 4; ++q) add(own[q / 4][q % 4], __ldcg(partial + q * 32));
        }
      }
    }
    if (owns) store_own<kRagged>(args, tile, own);
  }

 private:
  // Calls with_scales(use) for each step, which calls use with the type of DxScales.
  template <class Layout, class WithScales>
  __device__ __forceinline__ void add_steps(const DxArgs& args, const DxTile& tile, char* shared, int stage, int slot,
                                            const WithScales& with_scales) {
    constexpr int kSteps = tile::kDxStageRows / tile::kDxStepRows / 2;
    const int64_t row0 = tile.row0 + int64_t{stage} * tile::kDxStageRows;
    const uint32_t table = ptx::shared_address(shared);
    const uint32_t copy = 8 * (tile.lane % 16);
    const uint32_t w_lane = table + Layout::w_row(slot, 4 * tile.t) + ((tile.slab ^ tile.t) << 5) + 4 * tile.g;
    const char* dy_lane = shared + Layout::dy_chunk(slot, tile.g, 0) - ((tile.g & 3) << 5) + 8 * tile.t;
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      const int step = kSteps * tile.group + u, row = tile::kDxStepRows * step;
      const uint32_t w_step = w_lane + row * tile::kPairF32EntryBytes;
      const uint32_t w[4] = {ptx::load_shared_u32<0>(w_step), ptx::load_shared_u32<tile::kPairF32EntryBytes>(w_step),
                             ptx::load_shared_u32<2 * tile::kPairF32EntryBytes>(w_step),
                             ptx::load_shared_u32<3 * tile::kPairF32EntryBytes>(w_step)};
      constexpr uint32_t kHigh = 0xF0F0F0F0u;
      // Byte c of even01 joins the nibbles of column 2c in rows 4t and 4t + 1, and byte c of odd01 those of column 2c +
      // 1.
      const uint32_t even01 = ptx::select_bits(kHigh, w[0], w[1] >> 4);
      const uint32_t odd01 = ptx::select_bits(kHigh, w[0] << 4, w[1]);
      const uint32_t even23 = ptx::select_bits(kHigh, w[2], w[3] >> 4);
      const uint32_t odd23 = ptx::select_bits(kHigh, w[2] << 4, w[3]);

      uint32_t b[kTokenTiles][2];
      const char* dy_step = dy_lane + ((step ^ (tile.g & 3)) << 5);
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        const uint2 pair = *reinterpret_cast<const uint2*>(dy_step + j * 8 * tile::kDxDyTokenBytes);
        b[j][0] = pair.x;
        b[j][1] = pair.y;
      }

      with_scales([&](auto type) {
        const typename decltype(type)::type scales(args, tile, shared, row0, slot, row + 4 * tile.t);
        add_pair_of_columns<0>(table, copy, even01, odd01, even23, odd23, scales, b);
        add_pair_of_columns<1>(table, copy, even01, odd01, even23, odd23, scales, b);
        add_pair_of_columns<2>(table, copy, even01, odd01, even23, odd23, scales, b);
        add_pair_of_columns<3>(table, copy, even01, odd01, even23, odd23, scales, b);
      });
    }
  }

  // acc += mma kPair of a step's four. Its A operand has columns 2 kPair and 2 kPair + 1 of the lane's eight.
  template <int kPair, class S>
  __device__ __forceinline__ void add_pair_of_columns(uint32_t table, uint32_t copy, uint32_t even01, uint32_t odd01,
                                                      uint32_t even23, uint32_t odd23, const S& s,
                                                      const uint32_t (&b)[kTokenTiles][2]) {
    constexpr int kEven = 2 * kPair, kOdd = kEven + 1;
    const auto decode = [&](uint32_t codes, auto column, auto row) {  // of rows `row` and `row` + 1
      const float2 value = tile::lookup_pair_f32<kPair>(table, copy, codes);
      return ptx::pack2<T>(s.template apply<column, row>(value.x), s.template apply<column, row + 1>(value.y));
    };
    const uint32_t a0 = decode(even01, tile::Index<kEven>{}, tile::Index<0>{});
    const uint32_t a1 = decode(odd01, tile::Index<kOdd>{}, tile::Index<0>{});
    const uint32_t a2 = decode(even23, tile::Index<kEven>{}, tile::Index<2>{});
    const uint32_t a3 = decode(odd23, tile::Index<kOdd>{}, tile::Index<2>{});
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) ptx::mma_m16n8k16<T>(acc_[kPair][j], a0, a1, a2, a3, b[j][0], b[j][1]);
  }

  // Loads lora_a[r][column .. column + 7] as four pairs. Columns past the end are zeros.
  template <bool kRagged>
  __device__ __forceinline__ static void load_a(const DxArgs& args, int64_t r, int64_t column, uint32_t (&pairs)[4]) {
    const T* row = static_cast<const T*>(args.lora_a) + r * args.k + column;
    if constexpr (kRagged) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t low = r < args.rank && column + 2 * i < args.k ? row[2 * i].bits : 0u;
        const uint32_t high = r < args.rank && column + 2 * i + 1 < args.k ? row[2 * i + 1].bits : 0u;
        pairs[i] = low | high << 16;
      }
    } else {
      const bool inside = r < args.rank && column < args.k;
      const uint4 v = inside ? __ldg(reinterpret_cast<const uint4*>(row)) : make_uint4(0, 0, 0, 0);
      pairs[0] = v.x, pairs[1] = v.y, pairs[2] = v.z, pairs[3] = v.w;
    }
  }

  // Loads g[m][r .. r + 3]. Ranks past the end are zeros.
  __device__ __forceinline__ static uint2 load_g(const DxArgs& args, int64_t m, int64_t r) {
    const T* g = static_cast<const T*>(args.g) + m * args.rank + r;
    uint2 four = make_uint2(0, 0);
    if (m >= args.m || r >= args.rank) return four;
    if (args.rank % 4 == 0) return *reinterpret_cast<const uint2*>(g);
    four.x = g[0].bits;
    if (r + 1 < args.rank) four.x |= uint32_t{g[1].bits} << 16;
    if (r + 2 < args.rank) four.y = g[2].bits;
    if (r + 3 < args.rank) four.y |= uint32_t{g[3].bits} << 16;
    return four;
  }

  // First draws the mask of up to four token tiles, in a loop that is not unrolled because Philox is long, and then
  // applies it.
  __device__ __forceinline__ void apply_dropout(const DxArgs& args, const DxTile& tile) {
    const float keep_scale = static_cast<float>(args.dropout.keep_scale);
    constexpr int kAtOnce = kTokenTiles < 4 ? kTokenTiles : 4;
#pragma unroll
    for (int j0 = 0; j0 < kTokenTiles; j0 += kAtOnce) {
      uint64_t keep = 0;  // bit 16 j + 8 e + c: column c of token 8 (j0 + j) + 2t + e
#pragma unroll 1
      for (int i = 0; i < 2 * kAtOnce; ++i) {
        const int64_t m = tile.token0 + 8 * (j0 + i / 2) + 2 * tile.t + i % 2;
        keep |= uint64_t{tile::keep_mask(args.dropout, m * args.k + tile.column)} << (8 * i);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            const int bit = 16 * j + 8 * (q & 1) + 2 * i + (q >> 1);
            acc_[i][j0 + j][q] = keep >> bit & 1 ? acc_[i][j0 + j][q] * keep_scale : 0.0f;
          }
        }
      }
    }
  }

  // The slab's warps exchange the halves that they do not finish.
  __device__ __forceinline__ void exchange(const DxTile& tile, char* shared, float (&own)[kOwn][4][4]) {
    static_assert(2 * tile::kDxSlabs * kOwn * 4 * 512 <= tile::kPairF32Bytes);
    float4* mine =
        reinterpret_cast<float4*>(shared) + (tile.group * tile::kDxSlabs + tile.slab) * (kOwn * 128) + tile.lane;
    float4* theirs = mine + (tile.group == 0 ? 1 : -1) * tile::kDxSlabs * (kOwn * 128);
    constexpr int kOther = kTokenTiles == 1 ? 0 : kOwn;
    if (tile.group == 0) {
      copy_own<0>(own);
      if constexpr (kTokenTiles > 1) send<kOther>(theirs);
    } else {
      copy_own<kOther>(own);
      send<0>(theirs);
    }
    __syncthreads();
    if (kTokenTiles > 1 || tile.group == 0) {
#pragma unroll
      for (int q = 0; q < kOwn * 4; ++q) {
        add(own[q / 4][q % 4], mine[q * 32]);
      }
    }
  }

  __device__ __forceinline__ static void add(float (&v)[4], float4 p) {
    v[0] += p.x, v[1] += p.y, v[2] += p.z, v[3] += p.w;
  }

  template <int kFirst>
  __device__ __forceinline__ void copy_own(float (&own)[kOwn][4][4]) const {
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int q = 0; q < 4; ++q) own[j][i][q] = acc_[i][kFirst + j][q];
      }
    }
  }

  template <int kFirst>
  __device__ __forceinline__ void send(float4* to) const {
#pragma unroll
    for (int q = 0; q < kOwn * 4; ++q) {
      const float* v = acc_[q % 4][kFirst + q / 4];
      to[q * 32] = make_float4(v[0], v[1], v[2], v[3]);
    }
  }

  template <bool kRagged>
  __device__ __forceinline__ static void store_own(const DxArgs& args, const DxTile& tile,
                                                   const float (&own)[kOwn][4][4]) {
    const int64_t m0 = tile.token0 + 8 * kOwn * tile.group + 2 * tile.t;
    const int tokens = static_cast<int>(min(args.m - m0, int64_t{8 * kOwn}));
    const int columns = static_cast<int>(min(args.k - tile.column, int64_t{8}));
    T* to = static_cast<T*>(args.dx) + m0 * args.k + tile.column;
#pragma unroll
    for (int j = 0; j < kOwn; ++j, to += 8 * args.k) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (8 * j + e >= tokens || columns <= 0) continue;
        uint32_t out[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) out[i] = ptx::pack2<T>(own[j][i][e], own[j][i][2 + e]);
        T* token = e == 0 ? to : to + args.k;
        if constexpr (kRagged) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            if (i < columns) token[i].bits = static_cast<uint16_t>(out[i / 2] >> (16 * (i % 2)));
          }
        } else {
          ptx::store_stream_v4(token, make_uint4(out[0], out[1], out[2], out[3]));
        }
      }
    }
  }

  float acc_[4][kTokenTiles][4] = {};
};

}  // namespace qlora::kernels
