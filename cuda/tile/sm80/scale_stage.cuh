// Decodes the scales of a CTA's rows, and their offsets or zero points if a tile has any, for some segments at a time,
// once to shared memory. `load` only issues loads, and none of them depends on another. `store` decodes what has
// arrived.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/ptx/hold.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/tile/generic/arch_limits.cuh"
#include "cuda/tile/generic/block_scale.cuh"
#include "cuda/tile/sm80/integer_pairs.cuh"
#include "cuda/tile/sm80/linear_tile.cuh"

namespace qlora::tile {

// A copy of the scales' view takes registers, and a reference instructions that read its members again.
using StagedView = std::conditional_t<kFewRegisters, const ScaleView&, ScaleView>;

// Neighbouring threads take neighbouring groups of kColumns columns, so each sector of a row's codes is read once. Rows
// and groups beyond the last repeat the last one, which costs no branch here: their results are multiplied by zeros or
// not stored.
template <class Tile, int kSegments, int kColumns = kSegment>
class ScaleStage {
 public:
  __device__ __forceinline__ ScaleStage(const ScaleView& view, const CodeView& code, int64_t n0, int64_t n, int64_t k)
      : view_(view),
        unfactor_(code.unfactor),
        first_integer_(code.first_integer()),
        // ptxas would move a value that all lanes share to a uniform register, and wait for it before the other loads.
        offset_(nested_offset(view, ptx::reread_thread_index() / Tile::kThreads)),
        row_step_(kRowStep * k) {
    last_row_ = n - n0 < Tile::kRows ? static_cast<int>(n - n0) - 1 : Tile::kRows - 1;
    row_element_ = (n0 + min(row(0), last_row_)) * k;
  }

  // Loads for the segments from segment0 of k on, of which `count` exist.
  __device__ __forceinline__ void load(int64_t segment0, int count) {
    const int64_t element = row_element_ + segment0 * kSegment + min(group(), count * kPerSegment - 1) * kColumns;
    with_scale_loader(view_, [&](const auto& load) {
      load_each(element, [&](int i, int64_t block) { load(block, absmax_[i], code_[i]); });
    });
    if constexpr (kHasOffsets) {
      if (view_.scales.offsets)
        load_each(element, [&](int i, int64_t block) { raw_offset_[i] = load_offset(view_, block); });
    } else if constexpr (Tile::kZeroPoints) {
      const auto* zero_points = static_cast<const uint8_t*>(view_.scales.offsets.stored);
      load_each(element, [&](int i, int64_t block) { raw_offset_[i].bits = __ldg(zero_points + block); });
    }
  }

  // scale_value_at(code) is the place of a code's value (fill_scale_values_at).
  template <class At>
  __device__ __forceinline__ void store(uint32_t scales, const At& scale_value_at) const {
    const auto value_of = [&](uint32_t code) { return *scale_value_at(code); };
    with_scale_decoder(view_, value_of, offset_, [&](const auto& decode) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const uint32_t to = scales + Tile::scale_offset(row(i), group());
        const float scale = decode(absmax_[i], code_[i]);
        if constexpr (kHasOffsets) {
          const auto [kept, offset] = decode_scale_and_offset(view_, scale, raw_offset_[i]);
          ptx::store_shared_v2_f32(to, make_float2(kept, offset));
        } else if constexpr (Tile::kZeroPoints) {
          const float zero_point = static_cast<float>(raw_offset_[i].bits) - first_integer_;
          ptx::store_shared_f32(to, scale);
          ptx::store_shared_u32<Tile::kMinuends>(to, IntegerPairs<typename Tile::T>::minuend(zero_point));
        } else {
          ptx::store_shared_f32(to, scale * unfactor_);
        }
      }
    });
  }

 private:
  static constexpr bool kHasOffsets = kColumns < kSegment;
  static constexpr int kPerSegment = kSegment / kColumns;
  static constexpr int kRowStep = Tile::kThreads / (kSegments * kPerSegment);
  static constexpr int kEach = Tile::kRows / kRowStep;

  __device__ __forceinline__ static int group() { return threadIdx.x % (kSegments * kPerSegment); }
  __device__ __forceinline__ static int row(int i) { return threadIdx.x / (kSegments * kPerSegment) + i * kRowStep; }

  template <class Load>
  __device__ __forceinline__ void load_each(int64_t element, const Load& load_one) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      load_one(i, element >> view_.block_shift);
      if (row(i + 1) <= last_row_) element += row_step_;
    }
  }

  StagedView view_;
  const float unfactor_, first_integer_;  // of the weight's code
  float offset_;
  int last_row_;
  // In elements: from one row of this thread to its next, and where its first row begins.
  int64_t row_step_, row_element_;
  float absmax_[kEach];
  uint32_t code_[kEach] = {};
  RawOffset raw_offset_[kHasOffsets || Tile::kZeroPoints ? kEach : 1];
};

}  // namespace qlora::tile
