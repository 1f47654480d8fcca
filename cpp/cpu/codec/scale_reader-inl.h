// Reads the scales and offsets of a weight for kernels that stream it: one float per *granule*, or a scale per chunk.
#pragma once

#include <cstdint>

#include "cpp/cpu/codec/largest-inl.h"
#include "cpp/cpu/codec/scales-inl.h"
#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/format/dynamic8.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {

// The scales of chunks that have one each, for a loop that decodes them where it uses them (accumulate_chunks).
// begin(chunk) prepares for the scales of `chunk` and those after it, and returns the first chunk that needs another
// begin. of(chunk) is the scale in every lane.
struct DecodedChunkScales {
  const float* scale;
  int64_t begin(int64_t) const { return INT64_MAX; }
  stream::Floats of(int64_t chunk) const { return stream::splat(scale[chunk]); }
};
// Nested 8-bit scales as they are stored. A nested block holds a power of two of them.
struct NestedChunkScales {
  const uint8_t* code;  // of chunk 0, which is block `first` of the weight
  const float* nested_absmax;
  int64_t first;
  int log2_nested;
  stream::Floats offset, by;

  NestedChunkScales(const Scales& scales, int64_t first_)
      : code(scales.codes() + first_),
        nested_absmax(scales.nested_absmax),
        first(first_),
        log2_nested(__builtin_ctzll(static_cast<uint64_t>(scales.nested_block_size))),
        offset(stream::splat(*scales.nested_offset)),
        by(stream::zero()) {}
  int64_t begin(int64_t chunk) {
    const int64_t nested_block = (first + chunk) >> log2_nested;
    by = stream::splat(nested_absmax[nested_block]);
    return ((nested_block + 1) << log2_nested) - first;
  }
  stream::Floats of(int64_t chunk) const {
    return stream::add(stream::mul(stream::splat(kDynamic8.value[code[chunk]]), by), offset);
  }
};

// Reads scales as one float per *granule*: a quantization block or, if blocks are larger than a chunk, stream::kChunk
// weights of one.
class ScaleReader {
 public:
  explicit ScaleReader(const Scales& scales, int64_t largest_granule = stream::kChunk) : scales_(scales) {
    for (granule_ = kMinBlockSize; granule_ < scales.block_size && granule_ < largest_granule;) granule_ *= 2;
    log2_granule_ = __builtin_ctzll(static_cast<uint64_t>(granule_));
    log2_split_ = __builtin_ctzll(static_cast<uint64_t>(scales.block_size / granule_));
  }
  int64_t granule() const { return granule_; }
  int log2_granule() const { return log2_granule_; }

  // out[i] = the scale of granule first + i. stream::kLanes zeros follow, so that whole vectors may be loaded.
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
    return scales_.form == ScaleForm::kNested8 && scales_.block_size == stream::kChunk && (nested & (nested - 1)) == 0;
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
  static constexpr int kLog2LaneWeights = __builtin_ctz(stream::kLaneWeights);

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
      if (first % 2 && count)
        out[i++] = of_block[0];  // from an even one on, stream::kLanes granules lie in stream::kLanes / 2 blocks
      for (; i < count; i += stream::kLanes) {
        const int64_t block = (first + i) >> log2_split_, phase = first + i - (block << log2_split_);
        // What stream::lane_scales takes for a lane, stream::kLaneWeights weights, is a granule here.
        const stream::LaneGranules of_lanes =
            stream::granule_of_lanes(static_cast<int>(phase * stream::kLaneWeights), log2_split_ + kLog2LaneWeights);
        stream::store(out + i, stream::lane_scales(of_block + (block - first_block), of_lanes));
      }
    }
    stream::store(out + count, stream::zero());
  }

  const Scales scales_;
  int64_t granule_;
  int log2_granule_, log2_split_;
};

}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
