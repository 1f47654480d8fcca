// Encode and decode of the packed format. Included inside an anonymous namespace, once an instruction set.

inline float scale_at(const Scales& s, int64_t block) {
  if (s.absmax) return s.absmax[block];
  const float product = kDynamic8.value[s.codes[block]] * s.nested_absmax[block / s.nested_block_size];
  return product + *s.nested_offset;
}

template <class T>
void quantize_blocks(const T* w, int64_t numel, int64_t block_size, uint8_t* packed, float* absmax, int64_t begin,
                     int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * block_size;
    const int64_t last = first + block_size < numel ? first + block_size : numel;
    float largest = 0.0f;
    bool finite = true;
    for (int64_t i = first; i < last; ++i) {
      const float magnitude = bits_float(float_bits(to_float(w[i])) & 0x7FFFFFFFu);
      largest = magnitude > largest ? magnitude : largest;
      finite &= magnitude <= 3.40282347e38f;
    }
    absmax[block] = finite ? largest : bits_float(0x7FC00000u);
    const float inverse = inverse_absmax(absmax[block]);
    for (int64_t i = first; i < last; i += 2) {
      const int high = nf4_encode(to_float(w[i]) * inverse);
      const int low = i + 1 < last ? nf4_encode(to_float(w[i + 1]) * inverse) : kZeroCode;
      packed[i >> 1] = static_cast<uint8_t>(high << 4 | low);
    }
  }
}

void quantize_nf4(const Pool& pool, DType dtype, const void* w, int64_t numel, int64_t block_size, uint8_t* packed,
                  float* absmax) {
  auto body = [&](int64_t begin, int64_t end) {
    switch (dtype) {
      case DType::kBFloat16:
        return quantize_blocks(static_cast<const bfloat16*>(w), numel, block_size, packed, absmax, begin, end);
      case DType::kFloat16:
        return quantize_blocks(static_cast<const float16*>(w), numel, block_size, packed, absmax, begin, end);
      default:
        return quantize_blocks(static_cast<const float*>(w), numel, block_size, packed, absmax, begin, end);
    }
  };
  pool(ceil_div(numel, block_size), ceil_div(16384, block_size), body);
}

// Sum of one chunk in the format's own order (dynamic8.h).
inline double chunk_sum(const float* x, int64_t count) {
  double partial[kMeanLanes] = {};
  for (int64_t i = 0; i < count; ++i) partial[i % kMeanLanes] += static_cast<double>(x[i]);
  for (int64_t half = kMeanLanes / 2; half; half /= 2)
    for (int64_t p = 0; p < half; ++p) partial[p] += partial[p + half];
  return partial[0];
}

void quantize_absmax(const Pool& pool, const float* absmax, int64_t count, int64_t nested_block_size, uint8_t* codes,
                     float* nested_absmax, float* nested_offset) {
  double sum = 0.0;
  for (int64_t first = 0; first < count; first += kMeanChunk)
    sum += chunk_sum(absmax + first, count - first < kMeanChunk ? count - first : kMeanChunk);
  const float offset = count ? static_cast<float>(sum / static_cast<double>(count)) : 0.0f;
  *nested_offset = offset;
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * nested_block_size;
      const int64_t last = first + nested_block_size < count ? first + nested_block_size : count;
      float largest = 0.0f;
      bool nan = false;
      for (int64_t i = first; i < last; ++i) {
        const float magnitude = bits_float(float_bits(absmax[i] - offset) & 0x7FFFFFFFu);
        largest = magnitude > largest ? magnitude : largest;
        nan |= magnitude != magnitude;
      }
      nested_absmax[block] = nan ? bits_float(0x7FC00000u) : largest;
      const float inverse = inverse_absmax(nested_absmax[block]);
      for (int64_t i = first; i < last; ++i)
        codes[i] = static_cast<uint8_t>(dynamic8_encode((absmax[i] - offset) * inverse));
    }
  };
  pool(ceil_div(count, nested_block_size), 16, body);
}

void dequantize_absmax(const Pool& pool, const Scales& scales, int64_t count, float* absmax) {
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) absmax[i] = scale_at(scales, i);
  };
  pool(count, 4096, body);
}

template <class T>
void dequantize_range(const uint8_t* packed, const Scales& scales, T* out, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    from_float(kNf4.value[nf4_code_at(packed, i)] * scale_at(scales, i / scales.block_size), &out[i]);
}

void dequantize_nf4(const Pool& pool, const uint8_t* packed, const Scales& scales, int64_t numel, DType dtype,
                    void* out) {
  auto body = [&](int64_t begin, int64_t end) {
    begin *= scales.block_size;
    end = end * scales.block_size < numel ? end * scales.block_size : numel;
    switch (dtype) {
      case DType::kBFloat16:
        return dequantize_range(packed, scales, static_cast<bfloat16*>(out), begin, end);
      case DType::kFloat16:
        return dequantize_range(packed, scales, static_cast<float16*>(out), begin, end);
      default:
        return dequantize_range(packed, scales, static_cast<float*>(out), begin, end);
    }
  };
  pool(ceil_div(numel, scales.block_size), ceil_div(16384, scales.block_size), body);
}
