// Encode and decode of the packed format (cpp/format), written once against the vector vocabulary of vec_*.h. Included
// inside an anonymous namespace, once an instruction set.

// Threads share the work by strips of blocks: whole cache lines of absmax and of packed bytes.
inline constexpr int64_t kStripBlocks = kLanes;
inline constexpr int64_t kStripGrainElements = 16384;

inline constexpr int64_t kDecodedBlocks = 64;  // whose scales are decoded together

inline constexpr int64_t kLineBytes = 64;
inline constexpr int64_t kFirstCacheBytes = 8192;  // what a pass over a few blocks may take of it
inline constexpr int64_t kAheadBytes = 16384;      // 8192 measures the same, 4096 a sixth slower

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline bool is_nan(float x) { return x != x; }

inline void clear(uint8_t* bytes, int64_t count) {
  for (int64_t i = 0; i < count; ++i) bytes[i] = 0;
}

// max |w| over whole groups; NaN if there is any NaN or infinity.
template <class T>
inline float block_absmax(const T* w, int64_t count) {
  Largest<T> largest;
  for (int64_t i = 0; i < count; i += kGroup) largest.see(w + i);
  const float absmax = largest.magnitude();
  return absmax <= 3.40282347e+38f ? absmax : bits_float(0x7FC00000u);
}

// Encodes a block of whole groups, and fetches what lies kAheadBytes after it: the hardware's prefetchers idle between
// two passes over absmax.
template <class T>
inline void encode_block(const T* w, int64_t bytes, float inverse, uint8_t* packed) {
  constexpr int64_t kGroupBytes = kGroup * sizeof(T);
  const Floats scale = splat(inverse);
  const char* ahead = reinterpret_cast<const char*>(w) + kAheadBytes;
  for (int64_t byte = 0; byte < bytes; byte += kGroup / 2, ahead += kGroupBytes) {
    for (int64_t line = 0; line < kGroupBytes; line += kLineBytes) __builtin_prefetch(ahead + line);
    const Pairs group = load_pairs(w + 2 * byte);
    store_packed(packed + byte, encode(mul(group.even, scale)), encode(mul(group.odd, scale)));
  }
}

// A few blocks of whole groups, which fit in the first cache. Each pass goes over all of them: a block's codes wait for
// its absmax, and that wait would fill the processor's window were there no other block to work on.
template <class T>
inline void quantize_blocks(const T* w, int64_t blocks, int64_t block_size, uint8_t* packed, float* absmax) {
  float inverse[kStripBlocks];
  for (int64_t b = 0; b < blocks; ++b) absmax[b] = block_absmax(w + b * block_size, block_size);
  for (int64_t b = 0; b < blocks; ++b) inverse[b] = inverse_absmax(absmax[b]);
  for (int64_t b = 0; b < blocks; ++b) {
    encode_block(w + b * block_size, block_size / 2, inverse[b], packed + b * block_size / 2);
  }
  for (int64_t b = 0; b < blocks; ++b) {
    if (is_nan(absmax[b])) clear(packed + b * block_size / 2, block_size / 2);
  }
}

// The last block, where it is short. The zeros it is filled up with change no absmax.
template <class T>
void quantize_short_block(const T* w, int64_t count, uint8_t* packed, float* absmax) {
  T filled[kMaxBlockSize] = {};
  uint8_t bytes[kMaxBlockSize / 2];
  for (int64_t i = 0; i < count; ++i) filled[i] = w[i];
  quantize_blocks(filled, 1, ceil_div(count, kGroup) * kGroup, bytes, absmax);
  for (int64_t i = 0; i < packed_bytes(count); ++i) packed[i] = bytes[i];
  if (count & 1) packed[count / 2] = static_cast<uint8_t>((packed[count / 2] & 0xF0) | kZeroCode);
}

template <class T>
void quantize_all(const Pool& pool, const T* w, int64_t numel, int64_t block_size, uint8_t* packed, float* absmax) {
  const int64_t blocks = ceil_div(numel, block_size), whole_blocks = numel / block_size;
  const int64_t step = least(kStripBlocks, ceil_div(kFirstCacheBytes, block_size * static_cast<int64_t>(sizeof(T))));
  auto body = [=](int64_t begin, int64_t end) {
    const int64_t last = least(end * kStripBlocks, whole_blocks);
    for (int64_t b = begin * kStripBlocks; b < last; b += step) {
      quantize_blocks(w + b * block_size, least(step, last - b), block_size, packed + b * block_size / 2, absmax + b);
    }
    if (whole_blocks < blocks && end * kStripBlocks >= blocks) {
      const int64_t first = whole_blocks * block_size;
      quantize_short_block(w + first, numel - first, packed + first / 2, absmax + whole_blocks);
    }
  };
  pool(ceil_div(blocks, kStripBlocks), ceil_div(kStripGrainElements, kStripBlocks * block_size), body);
}

void quantize_nf4(const Pool& pool, DType dtype, const void* w, int64_t numel, int64_t block_size, uint8_t* packed,
                  float* absmax) {
  switch (dtype) {
    case DType::kBFloat16:
      return quantize_all(pool, static_cast<const bfloat16*>(w), numel, block_size, packed, absmax);
    case DType::kFloat16:
      return quantize_all(pool, static_cast<const float16*>(w), numel, block_size, packed, absmax);
    default:
      return quantize_all(pool, static_cast<const float*>(w), numel, block_size, packed, absmax);
  }
}

// The sum of a chunk in the format's own order (dynamic8.h).
inline double chunk_sum(const float* x, int64_t count) {
  double partial[kMeanLanes] = {};
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) accumulate(partial + i % kMeanLanes, load(x + i));
  for (int64_t i = whole; i < count; ++i) partial[i % kMeanLanes] += static_cast<double>(x[i]);
  for (int64_t half = kMeanLanes / 2; half; half /= 2)
    for (int64_t p = 0; p < half; ++p) partial[p] += partial[p + half];
  return partial[0];
}

// Chunks are summed side by side, and their sums added in order.
inline float mean(const Pool& pool, const float* x, int64_t count) {
  constexpr int64_t kChunksAtOnce = 256;
  double sum = 0.0;
  for (int64_t first = 0; first < count; first += kChunksAtOnce * kMeanChunk) {
    const float* part = x + first;
    const int64_t part_count = least(count - first, kChunksAtOnce * kMeanChunk);
    double sums[kChunksAtOnce];
    auto body = [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        sums[c] = chunk_sum(part + c * kMeanChunk, least(part_count - c * kMeanChunk, kMeanChunk));
      }
    };
    pool(ceil_div(part_count, kMeanChunk), 1, body);
    for (int64_t c = 0; c < ceil_div(part_count, kMeanChunk); ++c) sum += sums[c];
  }
  return count ? static_cast<float>(sum / static_cast<double>(count)) : 0.0f;
}

// One nested block: codes of (absmax - offset), whose largest magnitude is left in nested_absmax.
inline void quantize_nested_block(const float* absmax, int64_t count, float offset, uint8_t* codes,
                                  float* nested_absmax) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = float_bits(absmax[i] - offset) & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
  }
  if (largest >= 0x7F800000u) {  // a NaN or an infinity is among them
    *nested_absmax = bits_float(0x7FC00000u);
    return clear(codes, count);
  }
  *nested_absmax = bits_float(largest);
  const float inverse = inverse_absmax(*nested_absmax);
  const auto scaled = [&](const float* x) { return mul(sub(load(x), splat(offset)), splat(inverse)); };
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) store_dynamic8(codes + i, scaled(absmax + i));
  if (whole < count) {
    float filled[kLanes] = {};
    uint8_t last[kLanes];
    for (int64_t i = whole; i < count; ++i) filled[i - whole] = absmax[i];
    store_dynamic8(last, scaled(filled));
    for (int64_t i = whole; i < count; ++i) codes[i] = last[i - whole];
  }
}

void quantize_absmax(const Pool& pool, const float* absmax, int64_t count, int64_t nested_block_size, uint8_t* codes,
                     float* nested_absmax, float* nested_offset) {
  const float offset = *nested_offset = mean(pool, absmax, count);
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * nested_block_size;
      quantize_nested_block(absmax + first, least(count - first, nested_block_size), offset, codes + first,
                            nested_absmax + b);
    }
  };
  pool(ceil_div(count, nested_block_size), ceil_div(4096, nested_block_size), body);
}

void dequantize_absmax(const Pool& pool, const Scales& scales, int64_t count, float* absmax) {
  auto body = [&](int64_t begin, int64_t end) { read_scales(scales, begin, end - begin, absmax + begin); };
  pool(count, 4096, body);
}

// A block of whole groups.
template <bool kStream, class T>
inline void dequantize_block(float absmax, const uint8_t* packed, int64_t bytes, T* out) {
  const Table<T> table = make_table<T>(absmax);
  for (int64_t byte = 0; byte < bytes; byte += kGroup / 2) decode<kStream>(table, packed + byte, out + 2 * byte);
}
template <bool kStream, class T>
inline void dequantize_blocks(const float* absmax, const uint8_t* packed, int64_t blocks, int64_t block_size, T* out) {
  for (int64_t b = 0; b < blocks; ++b) {
    dequantize_block<kStream>(absmax[b], packed, block_size / 2, out);
    packed += block_size / 2;
    out += block_size;
  }
}

// Whole groups of the last block go straight to `out`; the rest by way of a copy.
template <class T>
void dequantize_short_block(float absmax, const uint8_t* packed, int64_t count, T* out) {
  const int64_t whole = count / kGroup * kGroup, rest = count - whole;
  dequantize_block<false>(absmax, packed, whole / 2, out);
  uint8_t bytes[kGroup / 2] = {};
  T values[kGroup];
  for (int64_t i = 0; i < packed_bytes(rest); ++i) bytes[i] = packed[whole / 2 + i];
  dequantize_block<false>(absmax, bytes, kGroup / 2, values);
  for (int64_t i = 0; i < rest; ++i) out[whole + i] = values[i];
}

template <bool kStream, class T>
void dequantize_all(const Pool& pool, const uint8_t* packed, const Scales& scales, int64_t numel, T* out) {
  const int64_t block_size = scales.block_size;
  const int64_t blocks = ceil_div(numel, block_size), whole_blocks = numel / block_size;
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t first = strip * kDecodedBlocks, count = least(blocks - first, kDecodedBlocks);
      float decoded[kDecodedBlocks];
      if (!scales.absmax) read_scales(scales, first, count, decoded);
      const float* const absmax = scales.absmax ? scales.absmax + first : decoded;
      dequantize_blocks<kStream>(absmax, packed + first * block_size / 2, least(count, whole_blocks - first),
                                 block_size, out + first * block_size);
      if (first + count > whole_blocks) {
        const int64_t start = whole_blocks * block_size;
        dequantize_short_block(absmax[whole_blocks - first], packed + start / 2, numel - start, out + start);
      }
    }
    if (kStream) finish_streaming();
  };
  pool(ceil_div(blocks, kDecodedBlocks), ceil_div(kStripGrainElements, kDecodedBlocks * block_size), body);
}

// What does not fit in the caches is written past them: a line that will be evicted before it is read again need not be
// fetched first.
inline constexpr int64_t kStreamBytes = 16 << 20;
template <class T>
void dequantize_as(const Pool& pool, const uint8_t* packed, const Scales& scales, int64_t numel, T* out) {
  const bool aligned = reinterpret_cast<uintptr_t>(out) % 64 == 0;
  if (aligned && numel * static_cast<int64_t>(sizeof(T)) >= kStreamBytes) {
    dequantize_all<true>(pool, packed, scales, numel, out);
  } else {
    dequantize_all<false>(pool, packed, scales, numel, out);
  }
}

void dequantize_nf4(const Pool& pool, const uint8_t* packed, const Scales& scales, int64_t numel, DType dtype,
                    void* out) {
  switch (dtype) {
    case DType::kBFloat16:
      return dequantize_as(pool, packed, scales, numel, static_cast<bfloat16*>(out));
    case DType::kFloat16:
      return dequantize_as(pool, packed, scales, numel, static_cast<float16*>(out));
    default:
      return dequantize_as(pool, packed, scales, numel, static_cast<float*>(out));
  }
}
