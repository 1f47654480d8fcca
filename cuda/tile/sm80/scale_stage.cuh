// Decodes the scales of a CTA's rows, and their offsets or zero points if a tile has any, for some segments at a time,
// once to shared memory. `load` only issues loads, and none of them depends on another. `store` decodes what has
// arrived. Both take one of kParts equal parts of the rows, so that fewer registers hold what is on its way.
#pragma once

#include <cstdint>

#include "cuda/ptx/shared.cuh"
#include "cuda/tile/any/block_scale.cuh"
#include "cuda/tile/any/unroll.cuh"
#include "cuda/tile/sm80/block_sums.cuh"
#include "cuda/tile/sm80/integer_pairs.cuh"
#include "cuda/tile/sm80/linear_tile.cuh"

namespace qlora::tile {

// Neighbouring threads take neighbouring groups of kColumns columns, so each sector of a row's codes is read once. Rows
// and groups beyond the last repeat the last one, which costs no branch here: their results are multiplied by zeros or
// not stored.
template <class Tile, int kSegments, int kColumns = kSegment, int kParts_ = 1, class View = ScaleView>
class ScaleStage {
  static constexpr bool kHasOffsets = kColumns < kSegment;
  static constexpr int kPerSegment = kSegment / kColumns;
  static constexpr int kRowStep = Tile::kThreads / (kSegments * kPerSegment);
  static constexpr int kEach = Tile::kRows / kRowStep / kParts_;

 public:
  static constexpr int kParts = kParts_;

  // What a thread has loaded of a part.
  struct Raw {
    float absmax[kEach];
    uint32_t code[kEach] = {};
    RawOffset offset[kHasOffsets || Tile::kIntegers ? kEach : 1];
  };

  __device__ __forceinline__ ScaleStage(const ScaleView& view, const CodeView& code, int64_t n0, int64_t n, int64_t k)
      : view_(view),
        unfactor_(code.unfactor),
        first_integer_(code.first_integer()),
        offset_(nested_offset(view)),
        n0_(n0),
        k_(k) {
    last_row_ = n - n0 < Tile::kRows ? static_cast<int>(n - n0) - 1 : Tile::kRows - 1;
  }

  // Loads for the segments from segment0 of k on, of which `count` exist.
  __device__ __forceinline__ void load(int part, int64_t segment0, int count, Raw& raw) {
    const int64_t element = (n0_ + min(row(part, 0), last_row_)) * k_ + segment0 * kSegment +
                            min(group(), count * kPerSegment - 1) * kColumns;
    with_scale_loader(view_, [&](const auto& load) {
      if constexpr (Tile::kResiduals)
        with_offset_loader(view_, [&](const auto& load_offset) {
          load_each(part, element, [&](int i, int64_t block) {
            load(block, raw.absmax[i], raw.code[i]);
            load_offset(block, raw.offset[i]);
          });
        });
      else
        load_each(part, element, [&](int i, int64_t block) { load(block, raw.absmax[i], raw.code[i]); });
    });
    if constexpr (kHasOffsets) {
      if (view_.scales.offsets)
        load_each(part, element, [&](int i, int64_t block) { raw.offset[i] = load_offset(view_, block); });
    } else if constexpr (Tile::kIntegers && !Tile::kResiduals) {
      const auto* zero_points = static_cast<const uint8_t*>(view_.scales.offsets.stored);
      load_each(part, element, [&](int i, int64_t block) { raw.offset[i].bits = __ldg(zero_points + block); });
    }
  }

  // `residuals` is the address of the buffer of tiles that have them.
  __device__ __forceinline__ void store(int part, const Raw& raw, uint32_t scales, uint32_t residuals,
                                        const float* scale_values) const {
    using Pairs = IntegerPairs<typename Tile::T>;
    const auto value_of = [&](uint32_t code) { return scale_values[code]; };
    with_scale_decoder(view_, value_of, offset_, [&](const auto& decode) {
      if constexpr (Tile::kResiduals) {
        static_assert(kRowStep % 8 == 0, "a thread's rows have the same swizzle");
        const uint32_t to = scales + Tile::scale_offset(row(part, 0), group());
        const uint32_t to_residual = residuals + Tile::residual_offset(row(part, 0), group());
        with_offset_decoder(view_, [&](const auto& decode_offset) {
          unroll<kEach>([&](auto i) {
            constexpr int kScale = i * kRowStep * Tile::kScaleRowBytes;
            const float scale = decode(raw.absmax[i], raw.code[i]);
            const auto [minuend, residual] = Pairs::split(scale, decode_offset(raw.offset[i]), 15.0f + first_integer_);
            ptx::store_shared_f32<kScale>(to, scale);
            ptx::store_shared_u32<kScale + Tile::kMinuends>(to, minuend);
            ptx::store_shared_u32<i * kRowStep * kPairTableEntryBytes>(to_residual, split_residual(residual));
          });
        });
      } else {
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const uint32_t to = scales + Tile::scale_offset(row(part, i), group());
          const float scale = decode(raw.absmax[i], raw.code[i]);
          if constexpr (kHasOffsets) {
            const auto [kept, offset] = decode_scale_and_offset(view_, scale, raw.offset[i]);
            ptx::store_shared_v2_f32(to, make_float2(kept, offset));
          } else if constexpr (Tile::kIntegers) {
            const float zero_point = static_cast<float>(raw.offset[i].bits) - first_integer_;
            ptx::store_shared_f32(to, scale);
            ptx::store_shared_u32<Tile::kMinuends>(to, Pairs::minuend(zero_point));
          } else {
            ptx::store_shared_f32(to, scale * unfactor_);
          }
        }
      }
    });
  }

 private:
  __device__ __forceinline__ static int group() { return threadIdx.x % (kSegments * kPerSegment); }
  __device__ __forceinline__ static int row(int part, int i) {
    return threadIdx.x / (kSegments * kPerSegment) + (part * kEach + i) * kRowStep;
  }

  template <class Load>
  __device__ __forceinline__ void load_each(int part, int64_t element, const Load& load_one) {
    const int64_t row_step = kRowStep * k_;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      load_one(i, element >> view_.block_shift);
      if (row(part, i + 1) <= last_row_) element += row_step;
    }
  }

  const View view_;
  const float unfactor_, first_integer_;  // of the weight's code
  const float offset_;
  const int64_t n0_, k_;
  int last_row_;
};

}  // namespace qlora::tile
