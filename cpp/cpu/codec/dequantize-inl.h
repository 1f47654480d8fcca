// Decodes the packed format (cpp/format), written with the operations of codec::.
#pragma once

#include <cstdint>

#include "cpp/cpu/codec/dequantize_wide-inl.h"
#include "cpp/cpu/codec/scales-inl.h"
#include "cpp/cpu/isa/codec.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/with_type-inl.h"

namespace qlora::cpu::QLORA_ISA {
namespace {

inline constexpr int64_t kDecodeGrainElements = 16384;
inline constexpr int64_t kDecodedBlocks = 64;  // blocks whose scales are decoded together

void dequantize_absmax(const Pool& pool, const Scales& scales, int64_t count, float* absmax) {
  auto body = [&](int64_t begin, int64_t end) { read_scales(scales, begin, end - begin, absmax + begin); };
  pool(count, 4096, body);
}

// Zero points are subtracted before the scale multiplies, with one rounding, as in the libraries that store them. Where
// a scale has at most 19 significant bits, that is the same as adding an offset.
enum class BlockOffsets { kNone, kAdded, kZeroPoints };

// The decoded values of each block's codes. The kind of offsets is a template parameter, so weights without offsets
// have no overhead.
template <class T, BlockOffsets kOffsets>
class BlockTables {
 public:
  BlockTables(const codec::Values& values, const float* scales, const float* offsets)
      : values_(values), scales_(scales), offsets_(offsets) {}
  codec::Table<T> operator[](int64_t block) const {
    if constexpr (kOffsets == BlockOffsets::kAdded)
      return codec::make_table<T>(values_, scales_[block], offsets_[block]);
    else if constexpr (kOffsets == BlockOffsets::kZeroPoints)
      return codec::make_shifted_table<T>(values_, scales_[block], offsets_[block]);
    else
      return codec::make_table<T>(values_, scales_[block]);
  }

 private:
  const codec::Values& values_;
  const float *scales_, *offsets_;
};

// Decodes a block that consists of whole groups.
template <bool kStream, class T>
inline void dequantize_block(const codec::Table<T>& table, const uint8_t* packed, int64_t bytes, T* out) {
  for (int64_t byte = 0; byte < bytes; byte += codec::kGroup / 2)
    codec::decode<kStream>(table, packed + byte, out + 2 * byte);
}
template <bool kStream, class Tables, class T>
inline void dequantize_blocks(const Tables& tables, const uint8_t* packed, int64_t blocks, int64_t block_size, T* out) {
  for (int64_t b = 0; b < blocks; ++b) {
    dequantize_block<kStream>(tables[b], packed, block_size / 2, out);
    packed += block_size / 2;
    out += block_size;
  }
}

// Decodes a block that ends within a group. Whole groups go straight to `out`, and the rest through a buffer.
template <class T>
void dequantize_ragged_block(const codec::Table<T>& table, const uint8_t* packed, int64_t count, T* out) {
  const int64_t whole = count / codec::kGroup * codec::kGroup, rest = count - whole;
  dequantize_block<false>(table, packed, whole / 2, out);
  uint8_t bytes[codec::kGroup / 2] = {};
  T decoded[codec::kGroup];
  for (int64_t i = 0; i < packed_bytes(rest); ++i) bytes[i] = packed[whole / 2 + i];
  dequantize_block<false>(table, bytes, codec::kGroup / 2, decoded);
  for (int64_t i = 0; i < rest; ++i) out[whole + i] = decoded[i];
}

template <bool kStream, BlockOffsets kOffsets, class T>
void dequantize_all(const Pool& pool, const Weight& w, int64_t numel, T* out) {
  const int64_t block_size = w.scales.block_size;
  const int64_t blocks = ceil_div(numel, block_size);
  const int64_t whole_blocks = block_size % codec::kGroup == 0 ? numel / block_size : 0;  // blocks of whole groups
  auto body = [&](int64_t begin, int64_t end) {
    const codec::Values values(w.table());
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t first = strip * kDecodedBlocks, count = min(blocks - first, kDecodedBlocks);
      float decoded[kDecodedBlocks];
      float offsets[kOffsets != BlockOffsets::kNone ? kDecodedBlocks : 1];
      const float* const scales = scales_at(w.scales, first, count, decoded);
      if constexpr (kOffsets == BlockOffsets::kAdded) read_offsets(w.scales, first, count, scales, offsets);
      if constexpr (kOffsets == BlockOffsets::kZeroPoints) read_zero_points(w.scales, first, count, offsets);
      const BlockTables<T, kOffsets> tables(values, scales, offsets);
      const int64_t whole = max(min(count, whole_blocks - first), 0);
      dequantize_blocks<kStream>(tables, w.packed + first * block_size / 2, whole, block_size,
                                 out + first * block_size);
      for (int64_t b = whole; b < count; ++b) {
        const int64_t start = (first + b) * block_size;
        dequantize_ragged_block(tables[b], w.packed + start / 2, min(block_size, numel - start), out + start);
      }
    }
    if (kStream) codec::finish_streaming();
  };
  pool(ceil_div(blocks, kDecodedBlocks), ceil_div(kDecodeGrainElements, kDecodedBlocks * block_size), body);
}

// Outputs of this size and more do not fit in the caches, and are written with stores that bypass them: a line that
// would be evicted before it is read again need not be fetched first.
inline constexpr int64_t kStreamBytes = 16 << 20;
template <BlockOffsets kOffsets, class T>
void dequantize_as(const Pool& pool, const Weight& w, T* out) {
  const int64_t numel = w.n * w.k;
  const bool aligned = reinterpret_cast<uintptr_t>(out) % 64 == 0;
  if (aligned && numel * static_cast<int64_t>(sizeof(T)) >= kStreamBytes) {
    dequantize_all<true, kOffsets>(pool, w, numel, out);
  } else {
    dequantize_all<false, kOffsets>(pool, w, numel, out);
  }
}

void dequantize_nf4(const Pool& pool, const Weight& w, DType dtype, void* out) {
  with_type(dtype, [&]<class T>() {
    if (is_wide(w.code)) return dequantize_wide(pool, w, static_cast<T*>(out));
    if (w.scales.offsets.form == OffsetForm::kZeroPoint8) {
      dequantize_as<BlockOffsets::kZeroPoints>(pool, w, static_cast<T*>(out));
    } else if (w.scales.offsets) {
      dequantize_as<BlockOffsets::kAdded>(pool, w, static_cast<T*>(out));
    } else {
      dequantize_as<BlockOffsets::kNone>(pool, w, static_cast<T*>(out));
    }
  });
}

}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
