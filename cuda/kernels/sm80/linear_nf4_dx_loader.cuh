// Loads stages of W, dy and scales into shared memory for the tensor-core dX kernel. Rows, columns and tokens past the
// end become zeros, so they add nothing. Each call loads the next stage in order.
#pragma once

#include <cstdint>

#include "cuda/kernels/sm80/linear_nf4_dx_parts.cuh"
#include "cuda/ptx/address.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/prmt.cuh"

namespace qlora::kernels {

// For k % 32 == 0, blocks of at least 32 weights, n % 8 == 0 and tensors aligned to 16 bytes: everything is copied by
// cp.async, except the scales. A thread always copies the same rows of a stage, so it reaches the next stage by adding
// constants.
template <class T, int kTokenTiles, bool kHasOffsets>
class DxLoader {
  using Layout = tile::DxLayout<kTokenTiles, false, kHasOffsets>;
  static constexpr int kWRows = tile::kDxThreads / 8;  // rows of W, or tokens of dy, that the CTA copies at a time
  static constexpr int kWCopies = tile::kDxStageRows / kWRows;
  static constexpr int kDyCopies = (Layout::kTokens + kWRows - 1) / kWRows;
  static constexpr int kScalesPerThread = 2;

 public:
  __device__ __forceinline__ DxLoader(const DxArgs& args, const DxTile& tile, char* shared)
      : args_(args),
        is_short_(args.scales.scale_bytes == 2 && tile::has_zero_points(args.scales)),
        shared_(shared),
        offset_(tile::nested_offset(args.scales)) {
    const int row = threadIdx.x / 8, chunk = threadIdx.x % 8;
    const uint32_t address = ptx::shared_address(shared);
    w_target_ = address + Layout::w_chunk(0, row, chunk);
    dy_target_ = address + Layout::dy_chunk(0, row, chunk);
    w_ = args.packed + ((tile.row0 + row) * args.k + tile.column0) / 2 + 16 * chunk;
    dy_ = static_cast<const T*>(args.dy) + (tile.token0 + row) * args.n + tile.row0 + 8 * chunk;
    w_rows_ = tile.column0 + 32 * chunk < args.k ? tile.rows - row : 0;
    dy_rows_ = tile.rows - 8 * chunk;
    tokens_ = static_cast<int>(min(args.m - tile.token0, int64_t{Layout::kTokens})) - row;

    const int groups_shift = 8 - tile::dx_scale_group_shift(args.scales, args.k);
    const int scale_group = threadIdx.x & ((1 << groups_shift) - 1), scale_row = threadIdx.x >> groups_shift;
    const int64_t column = tile.column0 + (scale_group << (8 - groups_shift));
    scale_step_ = tile::kDxThreads >> groups_shift;
    scale_rows_ = column < args.k ? tile.rows - scale_row : 0;
    scale_element_ = (tile.row0 + scale_row) * args.k + column;
    scale_target_ = shared + Layout::scale(0, scale_group, scale_row);
  }

  __device__ __forceinline__ void start_copies(int slot) {
#pragma unroll
    for (int i = 0; i < kWCopies; ++i) {
      ptx::cp_async_16(
          w_target_ + slot * (tile::kDxStageRows * tile::kPairF32EntryBytes) + i * kWRows * tile::kPairF32EntryBytes,
          w_ + i * (kWRows / 2) * args_.k, i * kWRows < w_rows_ ? 16 : 0);
    }
#pragma unroll
    for (int i = 0; i < kDyCopies; ++i) {
      if (kWRows > Layout::kTokens && threadIdx.x >= 8 * Layout::kTokens) break;
      ptx::cp_async_16(dy_target_ + slot * Layout::kDyStageBytes + i * kWRows * tile::kDxDyTokenBytes,
                       dy_ + i * kWRows * args_.n, dy_rows_ > 0 && i * kWRows < tokens_ ? 16 : 0);
    }
    w_ += (tile::kDxStageRows / 2) * args_.k;
    w_rows_ -= tile::kDxStageRows;
    dy_ += tile::kDxStageRows;
    dy_rows_ -= tile::kDxStageRows;
  }

  // Reads the stage's scales into registers. store_scales later decodes them into shared memory. For elements past the
  // end, load_scales reads the last scale and store_scales stores zero.
  __device__ __forceinline__ void load_scales() {
#pragma unroll
    for (int i = 0; i < kScalesPerThread; ++i) {
      const int step = i * scale_step_;
      if (step >= tile::kDxStageRows) break;
      const int64_t block = min((scale_element_ + step * args_.k) >> args_.scales.block_shift, args_.scales.blocks - 1);
      if (kHasOffsets && is_short_) {
        raw_[i].code = __ldg(tile::scale_halves(args_.scales) + block);
        raw_offset_[i].bits = __ldg(static_cast<const uint8_t*>(args_.scales.scales.offsets.stored) + block);
        continue;
      }
      raw_[i] = tile::load_scale(args_.scales, block);
      if constexpr (kHasOffsets) raw_offset_[i] = tile::load_offset(args_.scales, block);
    }
    scale_element_ += tile::kDxStageRows * args_.k;
  }

  __device__ __forceinline__ void store_scales(int slot) {
    const float* scale_values = reinterpret_cast<const float*>(shared_ + Layout::kScaleValues);
    float* to = reinterpret_cast<float*>(scale_target_ + slot * Layout::kScaleStageBytes);
#pragma unroll
    for (int i = 0; i < kScalesPerThread; ++i) {
      const int step = i * scale_step_;
      if (step >= tile::kDxStageRows) break;
      ScaleAndOffset both{};
      if (kHasOffsets && is_short_) {
        both.scale = tile::decode_scale_half(args_.scales, raw_[i].code);
        both.offset = -__fmul_rn(static_cast<float>(raw_offset_[i].bits), both.scale);
      } else {
        both.scale = tile::decode_scale(args_.scales, raw_[i], scale_values, offset_);
        if constexpr (kHasOffsets) both = tile::decode_scale_and_offset(args_.scales, both.scale, raw_offset_[i]);
      }
      to[step] = step < scale_rows_ ? both.scale : 0.0f;
      if constexpr (kHasOffsets)
        to[step + (Layout::kOffsets - Layout::kScales) / 4] = step < scale_rows_ ? both.offset : 0.0f;
    }
    scale_rows_ -= tile::kDxStageRows;
  }

 private:
  const DxArgs& args_;
  // Scales have 16 bits and offsets are zero points. Most checkpoints whose weights have offsets store them so, and
  // these take fewer instructions to load and decode.
  const bool is_short_;
  char* shared_;
  const uint8_t* w_;
  const T* dy_;
  char* scale_target_;
  int64_t scale_element_;  // the first weight, by flat index, of this thread's column group in its first row
  uint32_t w_target_, dy_target_;
  int w_rows_, dy_rows_, scale_rows_, tokens_;  // the numbers left, from this thread's first on
  int scale_step_;                              // rows from one of this thread's scales to the next
  float offset_;
  tile::RawScale raw_[kScalesPerThread];
  tile::RawOffset raw_offset_[kScalesPerThread];
};

// For any k, n and alignment, one element at a time.
template <class T, int kTokenTiles>
class DxRaggedLoader {
  using Layout = tile::DxLayout<kTokenTiles, true>;

 public:
  __device__ __forceinline__ DxRaggedLoader(const DxArgs& args, const DxTile& tile, char* shared)
      : args_(args), tile_(tile), shared_(shared), offset_(tile::nested_offset(args.scales)) {}

  __device__ __forceinline__ void start_copies(int slot) {
    const int64_t row0 = tile_.row0 + int64_t{copied_++} * tile::kDxStageRows;
    for (int i = threadIdx.x; i < tile::kDxStageRows * (tile::kDxColumns / 8); i += tile::kDxThreads) {
      const int row = i / 32, word = i % 32;
      const int64_t n = row0 + row, column = tile_.column0 + 8 * word;
      *reinterpret_cast<uint32_t*>(shared_ + Layout::w_chunk(slot, row, word / 4) + word % 4 * 4) =
          n < args_.n && column < args_.k ? eight_codes(n * args_.k + column) : 0u;
    }
    for (int i = threadIdx.x; i < Layout::kTokens * tile::kDxStageRows; i += tile::kDxThreads) {
      const int token = i / tile::kDxStageRows, row = i % tile::kDxStageRows;
      const int64_t m = tile_.token0 + token, n = row0 + row;
      *reinterpret_cast<uint16_t*>(shared_ + Layout::dy_chunk(slot, token, row / 8) + row % 8 * 2) =
          m < args_.m && n < args_.n ? static_cast<const T*>(args_.dy)[m * args_.n + n].bits : uint16_t{0};
    }
  }

  __device__ __forceinline__ void load_scales() {}

  // Column group j of a row is the j-th block, counted from the block in which the row's part of the tile begins.
  __device__ __forceinline__ void store_scales(int slot) {
    const float* scale_values = reinterpret_cast<const float*>(shared_ + Layout::kScaleValues);
    const int64_t row0 = tile_.row0 + int64_t{scaled_++} * tile::kDxStageRows;
    for (int i = threadIdx.x; i < tile::kDxStageRows * Layout::kScaleGroups; i += tile::kDxThreads) {
      const int row = i % tile::kDxStageRows, group = i / tile::kDxStageRows;
      const int64_t n = row0 + row;
      const int64_t block = ((n * args_.k + tile_.column0) >> args_.scales.block_shift) + group;
      float scale = 0.0f;
      if (n < args_.n && block < args_.scales.blocks) {
        scale = tile::read_scale(args_.scales, block, scale_values, offset_);
      }
      *reinterpret_cast<float*>(shared_ + Layout::scale(slot, group, row)) = scale;
    }
  }

 private:
  // Returns the codes of elements first .. first + 7 as 4 bytes. `first` may be the low nibble of its byte.
  __device__ __forceinline__ uint32_t eight_codes(int64_t first) const {
    const int64_t bytes = (args_.n * args_.k + 1) / 2;
    uint64_t big_endian = 0;
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      const int64_t at = first / 2 + i;
      big_endian = big_endian << 8 | (at < bytes ? __ldg(args_.packed + at) : 0u);
    }
    return ptx::prmt<0x0123>(static_cast<uint32_t>(big_endian >> (first % 2 ? 4 : 8)), 0);
  }

  const DxArgs& args_;
  const DxTile& tile_;
  char* shared_;
  float offset_;
  int copied_ = 0, scaled_ = 0;
};

}  // namespace qlora::kernels
