// The scales of some segments of a CTA's rows, decoded once to float32 in shared memory. `load` only reads, and nothing
// that it reads waits for something else that it reads; `store` decodes what has arrived.
#pragma once

#include <cstdint>

#include "cuda/ptx/shared.cuh"
#include "cuda/tile/block_scale.cuh"
#include "cuda/tile/linear_tile.cuh"

namespace qlora::tile {

// Neighbouring threads take neighbouring segments, so that the sectors of a row's codes are read once. Rows and
// segments that do not exist repeat the last one's: they are multiplied with zeros or not stored, and cost no branch
// here.
template <class Tile, int kSegments>
class ScaleStage {
 public:
  __device__ __forceinline__ ScaleStage(const ScaleView& view, int64_t n0, int64_t n, int64_t k)
      : view_(view), offset_(nested_offset(view)), row_step_(kRowStep * k) {
    last_row_ = n - n0 < Tile::kRows ? static_cast<int>(n - n0) - 1 : Tile::kRows - 1;
    row_element_ = (n0 + min(row(0), last_row_)) * k;
  }

  // The segments from segment0 of k on, of which `count` exist.
  __device__ __forceinline__ void load(int64_t segment0, int count) {
    const int64_t element = row_element_ + (segment0 + min(segment(), count - 1)) * kSegment;
    if (view_.scales.codes == nullptr)
      load_each(element, [&](int i, int64_t block) { absmax_[i] = __ldg(view_.scales.absmax + block); });
    else if (view_.nested_shift >= 0)
      load_each(element, [&](int i, int64_t block) { load_nested(i, block, block >> view_.nested_shift); });
    else
      load_each(element, [&](int i, int64_t block) { load_nested(i, block, block / view_.scales.nested_block_size); });
  }

  __device__ __forceinline__ void store(uint32_t scales, const float* dynamic8) const {
    constexpr float kUnfactor = 1.0f / kPairFactor<typename Tile::T>;
    const bool nested = view_.scales.codes != nullptr;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const float scale = nested ? __fadd_rn(__fmul_rn(dynamic8[code_[i]], absmax_[i]), offset_) : absmax_[i];
      ptx::store_shared_f32(scales + Tile::scale_offset(row(i), segment()), scale * kUnfactor);
    }
  }

 private:
  static constexpr int kRowStep = Tile::kThreads / kSegments;
  static constexpr int kEach = Tile::kRows / kRowStep;

  __device__ __forceinline__ static int segment() { return threadIdx.x % kSegments; }
  __device__ __forceinline__ static int row(int i) { return threadIdx.x / kSegments + i * kRowStep; }

  template <class Load>
  __device__ __forceinline__ void load_each(int64_t element, const Load& load_one) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      load_one(i, element >> view_.block_shift);
      if (row(i + 1) <= last_row_) element += row_step_;
    }
  }

  __device__ __forceinline__ void load_nested(int i, int64_t block, int64_t nested) {
    code_[i] = __ldg(view_.scales.codes + block);
    absmax_[i] = __ldg(view_.scales.nested_absmax + nested);
  }

  const ScaleView view_;
  float offset_;
  int last_row_;
  int64_t row_step_, row_element_;  // from a row to the next this thread takes, and where its first begins, in elements
  float absmax_[kEach];
  uint32_t code_[kEach] = {};
};

}  // namespace qlora::tile
