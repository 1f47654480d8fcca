// The vocabulary codec:: in plain C++, the definition that the other sets' codec.h reproduce bit for bit. Everything
// comes in groups of 32 weights (16 packed bytes).
#pragma once

#include <cstdint>
#include <cstring>

#include "cpp/cpu/isa/dynamic8_cells.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/codes.h"
#include "cpp/format/dtypes.h"
#include "cpp/format/stochastic.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace codec {

inline constexpr int kLanes = 16;
inline constexpr int kGroup = 2 * kLanes;

struct Floats {
  float lane[kLanes];
};

inline Floats splat(float x) {
  Floats r;
  for (float& lane : r.lane) lane = x;
  return r;
}
inline Floats load(const float* p) {
  Floats r;
  std::memcpy(r.lane, p, sizeof r.lane);
  return r;
}
inline void store(float* p, const Floats& x) { std::memcpy(p, x.lane, sizeof x.lane); }
inline Floats add(Floats a, const Floats& b) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] += b.lane[i];
  return a;
}
inline Floats sub(Floats a, const Floats& b) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] -= b.lane[i];
  return a;
}
inline Floats mul(Floats a, const Floats& b) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] *= b.lane[i];
  return a;
}
// a * b + c, rounded once.
inline Floats fma(const Floats& a, const Floats& b, Floats c) {
  for (int i = 0; i < kLanes; ++i) c.lane[i] = __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]);
  return c;
}
// `low` in lanes 0 to 7, `high` in lanes 8 to 15.
inline Floats halves(float low, float high) {
  Floats r;
  for (int i = 0; i < kLanes; ++i) r.lane[i] = i < kLanes / 2 ? low : high;
  return r;
}

// sums[0..16) += x, widened.
inline void accumulate(double* sums, const Floats& x) {
  for (int i = 0; i < kLanes; ++i) sums[i] += static_cast<double>(x.lane[i]);
}

// A group as floats, split so that a packed byte is one lane of each.
struct Pairs {
  Floats even, odd;
};
template <class T>
inline Pairs load_pairs(const T* p) {
  Pairs r;
  for (int i = 0; i < kLanes; ++i) {
    r.even.lane[i] = to_float(p[2 * i]);
    r.odd.lane[i] = to_float(p[2 * i + 1]);
  }
  return r;
}

struct Codes {
  uint8_t lane[kLanes];
};
// Encoding to a table's codes.
class Encoder {
 public:
  static constexpr bool serves(Code) { return true; }
  explicit Encoder(Code code) : table_(&table_of(code)) {}
  // The code of each lane's rank.
  Codes encode(const Floats& q) const {
    Codes r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = table_->code_of_rank[rank_of(*table_, q.lane[i])];
    return r;
  }
  // The same, if no |q| exceeds the table's largest value by more than a rounding. A NaN gets any code.
  Codes encode_within(const Floats& q) const { return encode(q); }
  // The value that each code stands for.
  Floats values(const Codes& c) const {
    Floats r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = table_->value[c.lane[i]];
    return r;
  }

 private:
  const CodeTable* table_;
};
// An encoder with the same functions that is faster, for the codes that it serves.
using FastEncoder = Encoder;
inline void store_codes(uint8_t* codes, const Codes& c) { std::memcpy(codes, c.lane, sizeof c.lane); }
inline void store_packed(uint8_t* packed, const Codes& even, const Codes& odd) {
  for (int i = 0; i < kLanes; ++i) packed[i] = static_cast<uint8_t>(even.lane[i] << 4 | odd.lane[i]);
}

// The random numbers of stochastic rounding (cpp/format/stochastic.h).
class Thresholds {
 public:
  explicit Thresholds(uint64_t seed) : seed_(seed) {}
  // The random numbers of the group that starts at element `first`, a multiple of kGroup.
  Pairs at(uint64_t first) const {
    Pairs r;
    for (int i = 0; i < kLanes; ++i) {
      r.even.lane[i] = rounding_threshold(seed_, first + 2 * static_cast<uint64_t>(i));
      r.odd.lane[i] = rounding_threshold(seed_, first + 2 * static_cast<uint64_t>(i) + 1);
    }
    return r;
  }

 private:
  uint64_t seed_;
};

// Stochastic rounding. The rank of q is the number of ranked[c] + threshold * gap[c] below it. Each of these lies
// between ranked[c] and the next value, so only those of the values around q need to be compared.
class StochasticEncoder {
 public:
  explicit StochasticEncoder(const CodeTable& table) : table_(&table) {}
  Codes encode(const Floats& q, const Floats& threshold) const {
    Codes r;
    for (int i = 0; i < kLanes; ++i) {
      int rank = 0;
      for (int c = 0; c + 1 < kCodes; ++c) {
        rank += q.lane[i] > table_->ranked[c] + threshold.lane[i] * table_->gap[c];
      }
      r.lane[i] = table_->code_of_rank[rank];
    }
    return r;
  }
  // Packs what `encode` returns.
  void store(uint8_t* packed, const Codes& even, const Codes& odd) const { store_packed(packed, even, odd); }

 private:
  const CodeTable* table_;
};
// The same for codes that are consecutive integers.
using ConsecutiveEncoder = StochasticEncoder;

// dynamic8_encode of each lane. No lane is NaN.
inline void store_dynamic8(uint8_t* codes, const Floats& q) {
  using Cells = Dynamic8Cells;
  for (int i = 0; i < kLanes; ++i) {
    const int32_t bits = static_cast<int32_t>(float_bits(q.lane[i])), sign = bits >> 31;
    int32_t place = (bits & INT32_MAX) - Cells::kLeastBits;
    place = place < 0 ? 0 : place < Cells::kRange ? place : Cells::kRange;
    const int32_t entry = kDynamic8Cells.entry[(place >> Cells::kLowBits) + (sign & Cells::kCells)];
    codes[i] = static_cast<uint8_t>((entry + ((place & Cells::kLowMask) ^ sign)) >> Cells::kLowBits);
  }
}

// The largest magnitude of the groups that it is given. Bits without the sign have the order of the magnitudes, and NaN
// is above infinity. So one integer maximum serves every type and loses no NaN.
template <class T>
struct BitsOf {
  using type = uint16_t;
};
template <>
struct BitsOf<float> {
  using type = uint32_t;
};
template <class T>
class Largest {
 public:
  void see(const T* group) {
    for (int i = 0; i < kGroup; ++i) {
      Bits bits;
      std::memcpy(&bits, group + i, sizeof bits);
      bits &= static_cast<Bits>(~Bits{0}) >> 1;
      bits_ = bits > bits_ ? bits : bits_;
    }
  }
  float magnitude() const {
    T x;
    std::memcpy(&x, &bits_, sizeof x);
    return to_float(x);
  }

 private:
  using Bits = typename BitsOf<T>::type;
  Bits bits_ = 0;
};

// The 16 values of a table, in the form that is multiplied by scales.
struct Values {
  const float* value;
  explicit Values(const CodeTable& table) : value(table.value) {}
  Floats times(float scale) const {
    // Volatile, because the compiler would turn a product with -1 into a negation, which flips the sign of a NaN.
    const volatile float* from = value;
    Floats r;
    for (int i = 0; i < kCodes; ++i) r.lane[i] = from[i] * scale;
    return r;
  }
};
// What the 16 codes decode to: numbers rounded to T, or a table's values under one scale.
template <class T>
struct Table {
  T value[kCodes];
};
template <class T>
inline Table<T> round_table(const Floats& decoded) {
  Table<T> r;
  for (int i = 0; i < kCodes; ++i) from_float(decoded.lane[i], &r.value[i]);
  return r;
}
template <class T>
inline Table<T> make_table(const Values& values, float scale) {
  return round_table<T>(values.times(scale));
}

// Decodes a group. kStream asks for stores that bypass the caches; `out` must then be aligned to 64 bytes.
template <bool kStream, class T>
inline void decode(const Table<T>& table, const uint8_t* packed, T* out) {
  for (int i = 0; i < kLanes; ++i) {
    out[2 * i] = table.value[packed[i] >> 4];
    out[2 * i + 1] = table.value[packed[i] & 15];
  }
}
inline void finish_streaming() {}
// The same, with even and odd elements apart.
inline Pairs decode_pairs(const Table<float>& table, const uint8_t* packed) {
  Pairs r;
  for (int i = 0; i < kLanes; ++i) {
    r.even.lane[i] = table.value[packed[i] >> 4];
    r.odd.lane[i] = table.value[packed[i] & 15];
  }
  return r;
}

// Decodes the first nested scales, as many as the set decodes faster together than one by one. Returns their number.
inline int64_t decode_many_scales(const uint8_t*, int64_t, float, float, float*) { return 0; }
// The same for out[i] = table[codes[i]], with 256 values in `table`.
inline int64_t look_up_many_scales(const uint8_t*, int64_t, const float*, float*) { return 0; }
// The same for scales that are stored as float16.
inline int64_t widen_many_scales(const float16*, int64_t, float*) { return 0; }

// out[i] = bytes[i] * step * by, rounded after each product, for eight bytes
inline void multiply_eight(const uint8_t* bytes, float step, float by, float* out) {
  for (int i = 0; i < 8; ++i) out[i] = static_cast<float>(bytes[i]) * step * by;
}

}  // namespace codec
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
