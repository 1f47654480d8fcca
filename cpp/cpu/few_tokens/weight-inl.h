// Where weight rows begin in the packed bytes that the kernels of this folder stream, and how their scales are read.
//
// A lane is eight consecutive weights, a dword of packed bytes. When K is not a multiple of eight, a row starts inside
// a lane: its *shift* is the number of weights of that lane that come before it, and rows a *period* apart have the
// same shift. With K = 12, for instance, the period is 2:
//
// clang-format off
//   lanes     | 0 .. 7  | 8 .. 15     | 16 .. 23 | 24 .. 31 | 32 .. 39    | 40 .. 47 |
//   rows      | 0       | 0    | 1    | 1        | 2        | 2    | 3    | 3        |
//   shift       0              4                   0               4
// clang-format on
#pragma once

#include <cstdint>

#include "cpp/cpu/codec/scales-inl.h"
#include "cpp/cpu/few_tokens/products-inl.h"
#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/format/dynamic8.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace few_tokens {

using namespace stream;

struct WeightRows {
  int64_t k;
  int period;  // rows of W: 1, 2, 4 or 8

  explicit WeightRows(int64_t k_) : k(k_), period(k_ % 8 == 0 ? 1 : k_ % 4 == 0 ? 2 : k_ % 2 == 0 ? 4 : 8) {}
  int shift(int64_t row) const { return static_cast<int>((row * k) & 7); }
  int64_t first_weight(int64_t row) const { return (row * k) & ~int64_t{7}; }
  int max_shift() const { return 8 - 8 / period; }
};

// The scales of chunks that have one each, for a loop that decodes them where it uses them (accumulate_chunks).
// begin(chunk) prepares for the scales of `chunk` and those after it, and returns the first chunk that needs another
// begin. of(chunk) is the scale in every lane.
struct DecodedChunkScales {
  const float* scale;
  int64_t begin(int64_t) const { return INT64_MAX; }
  Floats of(int64_t chunk) const { return splat(scale[chunk]); }
};
// Nested 8-bit scales as they are stored. A nested block holds a power of two of them.
struct NestedChunkScales {
  const uint8_t* code;  // of chunk 0, which is block `first` of the weight
  const float* nested_absmax;
  int64_t first;
  int log2_nested;
  Floats offset, by;

  NestedChunkScales(const Scales& scales, int64_t first_)
      : code(scales.codes() + first_),
        nested_absmax(scales.nested_absmax),
        first(first_),
        log2_nested(__builtin_ctzll(static_cast<uint64_t>(scales.nested_block_size))),
        offset(splat(*scales.nested_offset)),
        by(zero()) {}
  int64_t begin(int64_t chunk) {
    const int64_t nested_block = (first + chunk) >> log2_nested;
    by = splat(nested_absmax[nested_block]);
    return ((nested_block + 1) << log2_nested) - first;
  }
  Floats of(int64_t chunk) const { return add(mul(splat(kDynamic8.value[code[chunk]]), by), offset); }
};

// Reads scales as one float per *granule*: a quantization block or, if blocks are larger than a chunk, kChunk weights
// of one.
class ScaleReader {
 public:
  explicit ScaleReader(const Scales& scales, int64_t largest_granule = kChunk) : scales_(scales) {
    for (granule_ = kMinBlockSize; granule_ < scales.block_size && granule_ < largest_granule;) granule_ *= 2;
    log2_granule_ = __builtin_ctzll(static_cast<uint64_t>(granule_));
    log2_split_ = __builtin_ctzll(static_cast<uint64_t>(scales.block_size / granule_));
  }
  int64_t granule() const { return granule_; }
  int log2_granule() const { return log2_granule_; }

  // out[i] = the scale of granule first + i. kLanes zeros follow, so that whole vectors may be loaded.
  void read(int64_t first, int64_t count, float* out) const {
    read_granules(first, count, out, [&](int64_t block, int64_t blocks, float* of_block) {
      read_scales(scales_, block, blocks, of_block);
    });
  }

  // The same for the offsets of a weight that has them. `scale` is what `read` has written.
  void read_offsets(int64_t first, int64_t count, const float* scale, float* out) const {
    read_granules(first, count, out, [&](int64_t block, int64_t blocks, float* of_block) {
      const float* of_same_block = scale;
      if (log2_split_ && scales_.offsets.form == OffsetForm::kZeroPoint8) {
        read_scales(scales_, block, blocks, of_block);
        of_same_block = of_block;
      }
      QLORA_ISA::read_offsets(scales_, block, blocks, of_same_block, of_block);
    });
  }

  // The scales of chunks that are blocks, if they are nested and a loop can decode them one by one.
  bool has_nested_chunks() const {
    const int64_t nested = scales_.nested_block_size;
    return scales_.form == ScaleForm::kNested8 && scales_.block_size == kChunk && (nested & (nested - 1)) == 0;
  }
  NestedChunkScales nested_chunks(int64_t first) const { return NestedChunkScales(scales_, first); }

  // Prefetches the stored scales of weights begin .. end - 1.
  void prefetch_blocks(int64_t begin, int64_t end) const {
    const int64_t first = begin / scales_.block_size, count = ceil_div(end, scales_.block_size) - first;
    prefetch_scales(scales_, first, count);
  }

  // A bound of the finite scales of granules first .. first + count - 1.
  float largest(int64_t first, int64_t count) const {
    return scale_bound(scales_, first >> log2_split_, (first + count - 1) >> log2_split_,
                       [](const float* x, int64_t n) { return largest_bits_within(x, n); });
  }
  // The same from `scale`, which `read` has written.
  float largest(int64_t first, int64_t count, const float* scale) const {
    if (scales_.form == ScaleForm::kNested8) return largest(first, count);
    return largest_finite(scale, count, largest_bits_within(scale, count));
  }

 private:
  static constexpr int kLog2LaneWeights = __builtin_ctz(kLaneWeights);

  // Scales or offsets of blocks are read into the end of `out` and copied to their granules from the first to the last.
  // So none is overwritten before it has been copied.
  template <class ReadBlocks>
  void read_granules(int64_t first, int64_t count, float* out, const ReadBlocks& read_blocks) const {
    if (log2_split_ == 0) {
      read_blocks(first, count, out);
    } else {
      const int64_t first_block = first >> log2_split_, blocks = ((first + count - 1) >> log2_split_) + 1 - first_block;
      float* const of_block = out + (count - blocks);
      if (count) read_blocks(first_block, blocks, of_block);
      int64_t i = 0;
      if (first % 2 && count) out[i++] = of_block[0];  // from an even one on, kLanes granules lie in kLanes / 2 blocks
      for (; i < count; i += kLanes) {
        const int64_t block = (first + i) >> log2_split_, phase = first + i - (block << log2_split_);
        // What lane_scales takes for a lane, kLaneWeights weights, is a granule here.
        const LaneGranules of_lanes =
            granule_of_lanes(static_cast<int>(phase * kLaneWeights), log2_split_ + kLog2LaneWeights);
        store(out + i, lane_scales(of_block + (block - first_block), of_lanes));
      }
    }
    store(out + count, zero());
  }

  const Scales scales_;
  int64_t granule_;
  int log2_granule_, log2_split_;
};

}  // namespace few_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
