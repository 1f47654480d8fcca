// Encodes to the packed format (cpp/format), written with the operations of codec::.
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/codec.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/prefetch-inl.h"
#include "cpp/cpu/shared/with_type-inl.h"
#include "cpp/format/codes.h"
#include "cpp/format/dynamic8.h"

namespace qlora::cpu::QLORA_ISA {
namespace {

// Threads divide the work into strips of blocks, which are whole cache lines of absmax and of packed bytes.
inline constexpr int64_t kStripBlocks = codec::kLanes;
inline constexpr int64_t kEncodeGrainElements = 16384;

inline constexpr int64_t kPassBytes = 8192;    // bytes of w per pass: a part of the L1 cache
inline constexpr int64_t kAheadBytes = 16384;  // prefetch distance; 8192 is as fast, 4096 a sixth slower

inline bool is_nan(float x) { return x != x; }

inline void fill(uint8_t* bytes, int64_t count, uint8_t byte) {
  for (int64_t i = 0; i < count; ++i) bytes[i] = byte;
}

// The magnitude from which a block's scale follows: NaN if the block has a NaN or an infinity.
template <class T>
inline float finite_magnitude(const codec::Largest<T>& largest) {
  const float absmax = largest.magnitude();
  return absmax <= 3.40282347e+38f ? absmax : bits_float(0x7FC00000u);
}
// max |w| over whole groups.
template <class T>
inline float block_absmax(const T* w, int64_t count) {
  codec::Largest<T> largest;
  for (int64_t i = 0; i < count; i += codec::kGroup) largest.see(w + i);
  return finite_magnitude(largest);
}

template <class Encoder, class T>
inline void encode_own_group(const Encoder& encoder, const T* group, codec::Floats inverse, uint8_t* packed) {
  const codec::Pairs pairs = codec::load_pairs(group);
  codec::store_packed(packed, encoder.encode_within(codec::mul(pairs.even, inverse)),
                      encoder.encode_within(codec::mul(pairs.odd, inverse)));
}
// Encodes a block of whole groups, and prefetches the weights kAheadBytes further on. The hardware's prefetchers idle
// while a pass encodes, because the previous pass has just read the same memory.
template <class Encoder, class T>
inline void encode_block(const Encoder& encoder, const T* w, int64_t bytes, float inverse, uint8_t* packed) {
  constexpr int64_t kGroupBytes = codec::kGroup * sizeof(T);
  const codec::Floats scale = codec::splat(inverse);
  const char* ahead = reinterpret_cast<const char*>(w) + kAheadBytes;
  for (int64_t byte = 0; byte < bytes; byte += codec::kGroup / 2, ahead += kGroupBytes) {
    prefetch(ahead, kGroupBytes);
    encode_own_group(encoder, w + 2 * byte, scale, packed + byte);
  }
}

// Quantizes a few blocks of whole groups, which fit in the L1 cache. Each pass covers all of them: a block's codes
// depend on its absmax, and with a single block this latency would fill the processor's out-of-order window.
template <class Encoder, class T>
inline void quantize_blocks(const Encoder& encoder, const CodeTable& table, const T* w, int64_t blocks,
                            int64_t block_size, uint8_t* packed, float* absmax) {
  float inverse[kStripBlocks];
  for (int64_t b = 0; b < blocks; ++b)
    absmax[b] = scale_of(block_absmax(w + b * block_size, block_size), table.largest);
  for (int64_t b = 0; b < blocks; ++b) inverse[b] = inverse_absmax(absmax[b]);
  for (int64_t b = 0; b < blocks; ++b) {
    encode_block(encoder, w + b * block_size, block_size / 2, inverse[b], packed + b * block_size / 2);
  }
  for (int64_t b = 0; b < blocks; ++b) {
    if (is_nan(absmax[b])) fill(packed + b * block_size / 2, block_size / 2, table.nan_byte());
  }
}

// Quantizes a block that ends within a group. The zeros that pad it do not change the absmax.
template <class Encoder, class T>
void quantize_ragged_block(const Encoder& encoder, const CodeTable& table, const T* w, int64_t count, uint8_t* packed,
                           float* absmax) {
  const int64_t whole = count / codec::kGroup * codec::kGroup;
  T filled[codec::kGroup] = {};
  for (int64_t i = whole; i < count; ++i) filled[i - whole] = w[i];
  codec::Largest<T> largest;
  for (int64_t i = 0; i < whole; i += codec::kGroup) largest.see(w + i);
  largest.see(filled);
  *absmax = scale_of(finite_magnitude(largest), table.largest);
  const float inverse = inverse_absmax(*absmax);
  uint8_t bytes[codec::kGroup / 2];
  encode_block(encoder, w, whole / 2, inverse, packed);
  encode_own_group(encoder, filled, codec::splat(inverse), bytes);
  for (int64_t i = whole / 2; i < packed_bytes(count); ++i) packed[i] = bytes[i - whole / 2];
  if (is_nan(*absmax)) fill(packed, packed_bytes(count), table.nan_byte());
  if (count & 1) packed[count / 2] = static_cast<uint8_t>((packed[count / 2] & 0xF0) | table.zero_code);
}

template <class Encoder, class T>
void quantize_all(const Pool& pool, const Encoder& encoder, const CodeTable& table, const T* w, int64_t numel,
                  int64_t block_size, uint8_t* packed, float* absmax) {
  const int64_t blocks = ceil_div(numel, block_size);
  const int64_t whole_blocks = block_size % codec::kGroup == 0 ? numel / block_size : 0;  // blocks of whole groups
  const int64_t step = min(kStripBlocks, ceil_div(kPassBytes, block_size * static_cast<int64_t>(sizeof(T))));
  auto body = [=, &table](int64_t begin, int64_t end) {
    const int64_t last = min(end * kStripBlocks, blocks), last_whole = min(last, whole_blocks);
    for (int64_t b = begin * kStripBlocks; b < last_whole; b += step) {
      quantize_blocks(encoder, table, w + b * block_size, min(step, last_whole - b), block_size,
                      packed + b * block_size / 2, absmax + b);
    }
    for (int64_t b = max(begin * kStripBlocks, whole_blocks); b < last; ++b) {
      const int64_t first = b * block_size;
      quantize_ragged_block(encoder, table, w + first, min(block_size, numel - first), packed + first / 2, absmax + b);
    }
  };
  pool(ceil_div(blocks, kStripBlocks), ceil_div(kEncodeGrainElements, kStripBlocks * block_size), body);
}

void quantize_nf4(const Pool& pool, Code code, DType dtype, const void* w, int64_t numel, int64_t block_size,
                  uint8_t* packed, float* absmax) {
  const CodeTable& table = table_of(code);
  codec::with_encoder(code, [&](const auto& encoder) {
    with_type(dtype, [&]<class T>() {
      quantize_all(pool, encoder, table, static_cast<const T*>(w), numel, block_size, packed, absmax);
    });
  });
}

// Returns the sum of a chunk in the format's order (dynamic8.h).
inline double chunk_sum(const float* x, int64_t count) {
  double partial[kMeanLanes] = {};
  const int64_t whole = count / codec::kLanes * codec::kLanes;
  for (int64_t i = 0; i < whole; i += codec::kLanes) codec::accumulate(partial + i % kMeanLanes, codec::load(x + i));
  for (int64_t i = whole; i < count; ++i) partial[i % kMeanLanes] += static_cast<double>(x[i]);
  for (int64_t half = kMeanLanes / 2; half; half /= 2)
    for (int64_t p = 0; p < half; ++p) partial[p] += partial[p + half];
  return partial[0];
}

// Chunks are summed in parallel, and their sums are added in order.
inline float mean(const Pool& pool, const float* x, int64_t count) {
  constexpr int64_t kChunksAtOnce = 256;
  double sum = 0.0;
  for (int64_t first = 0; first < count; first += kChunksAtOnce * kMeanChunk) {
    const float* part = x + first;
    const int64_t part_count = min(count - first, kChunksAtOnce * kMeanChunk);
    double sums[kChunksAtOnce];
    auto body = [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        sums[c] = chunk_sum(part + c * kMeanChunk, min(part_count - c * kMeanChunk, kMeanChunk));
      }
    };
    pool(ceil_div(part_count, kMeanChunk), 1, body);
    for (int64_t c = 0; c < ceil_div(part_count, kMeanChunk); ++c) sum += sums[c];
  }
  return count ? static_cast<float>(sum / static_cast<double>(count)) : 0.0f;
}

// Quantizes one nested block: the codes of (absmax - offset). nested_absmax receives the largest magnitude.
inline void quantize_nested_block(const float* absmax, int64_t count, float offset, uint8_t* codes,
                                  float* nested_absmax) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = float_bits(absmax[i] - offset) & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
  }
  if (largest >= 0x7F800000u) {  // a NaN or an infinity is among them
    *nested_absmax = bits_float(0x7FC00000u);
    return fill(codes, count, 0);
  }
  *nested_absmax = bits_float(largest);
  const float inverse = inverse_absmax(*nested_absmax);
  const auto scaled = [&](const float* x) {
    return codec::mul(codec::sub(codec::load(x), codec::splat(offset)), codec::splat(inverse));
  };
  const int64_t whole = count / codec::kLanes * codec::kLanes;
  for (int64_t i = 0; i < whole; i += codec::kLanes) codec::store_dynamic8(codes + i, scaled(absmax + i));
  if (whole < count) {
    float filled[codec::kLanes] = {};
    uint8_t last[codec::kLanes];
    for (int64_t i = whole; i < count; ++i) filled[i - whole] = absmax[i];
    codec::store_dynamic8(last, scaled(filled));
    for (int64_t i = whole; i < count; ++i) codes[i] = last[i - whole];
  }
}

void quantize_absmax(const Pool& pool, const float* absmax, int64_t count, int64_t nested_block_size, uint8_t* codes,
                     float* nested_absmax, float* nested_offset) {
  const float offset = *nested_offset = mean(pool, absmax, count);
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * nested_block_size;
      quantize_nested_block(absmax + first, min(count - first, nested_block_size), offset, codes + first,
                            nested_absmax + b);
    }
  };
  pool(ceil_div(count, nested_block_size), ceil_div(4096, nested_block_size), body);
}

}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
