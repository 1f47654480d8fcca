// The vocabulary panel:: in plain C++, the definition of what the kernels for many tokens ask of a vector unit. `F` is
// a vector of kLanes floats.
#pragma once

#include <cstdint>

#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/codes.h"
#include "cpp/format/dtypes.h"
#include "cpp/format/philox.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace panel {

#ifndef QLORA_PLAIN_LANES
#define QLORA_PLAIN_LANES 4  // tests compile it with 16, for kernels that ask for those
#endif
inline constexpr int kLanes = QLORA_PLAIN_LANES;
inline constexpr int kAccumulators = 12;        // vectors of sums that a tile of outputs keeps in registers
inline constexpr bool kSpareRegisters = false;  // whether enough are left to decode weights between multiplications

struct F {
  float lane[kLanes];
};

inline F zero() { return {}; }
inline F splat(float x) {
  F v;
  for (float& lane : v.lane) lane = x;
  return v;
}
// *p in every lane, as an operand of multiply_add.
using Broadcast = F;
inline Broadcast broadcast(const float* p) { return splat(*p); }
inline F add(F a, F b) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] += b.lane[i];
  return a;
}
inline F mul(F a, F b) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] *= b.lane[i];
  return a;
}
// a * b + c, rounded once if the set has an instruction for that. Here it is rounded twice.
inline F multiply_add(F a, F b, F c) { return add(mul(a, b), c); }

// Loads `count` elements, and zeros after them. Nothing beyond them is touched.
template <class T>
inline F load_first(const T* p, int count) {
  F v = {};
  for (int i = 0; i < count; ++i) v.lane[i] = to_float(p[i]);
  return v;
}
template <class T>
inline F load(const T* p) {
  return load_first(p, kLanes);
}
template <class T>
inline void store_first(T* p, F v, int count) {
  for (int i = 0; i < count; ++i) from_float(v.lane[i], &p[i]);
}
template <class T>
inline void store(T* p, F v) {
  store_first(p, v, kLanes);
}

// Zeroes the lanes of v whose random bits are below `threshold`.
inline F keep_from(F v, const uint32_t* bits, uint32_t threshold) {
  for (int i = 0; i < kLanes; ++i) v.lane[i] = bits[i] < threshold ? 0.0f : v.lane[i];
  return v;
}

// Splits the pairs of neighbouring lanes of a and then b into their first and their second lanes.
inline void unzip(F a, F b, F& even, F& odd) {
  for (int i = 0; i < kLanes; ++i) {
    even.lane[i] = 2 * i < kLanes ? a.lane[2 * i] : b.lane[2 * i - kLanes];
    odd.lane[i] = 2 * i < kLanes ? a.lane[2 * i + 1] : b.lane[2 * i + 1 - kLanes];
  }
}

// The inverse of unzip.
inline void zip(F even, F odd, F& a, F& b) {
  for (int i = 0; i < kLanes; ++i) {
    F& to = 2 * i < kLanes ? a : b;
    to.lane[2 * i % kLanes] = even.lane[i];
    to.lane[2 * i % kLanes + 1] = odd.lane[i];
  }
}

// v[i][j] <-> v[j][i]
inline void transpose(F (&v)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float t = v[i].lane[j];
      v[i].lane[j] = v[j].lane[i];
      v[j].lane[i] = t;
    }
  }
}

// Convert a group between memory order (element 4i + j) and the order in which nibbles are decoded (vector j, lane i).
inline void decoded_to_memory_order(F (&v)[4]) {
  F out[4];
  for (int e = 0; e < 4 * kLanes; ++e) out[e / kLanes].lane[e % kLanes] = v[e % 4].lane[e / 4];
  for (int j = 0; j < 4; ++j) v[j] = out[j];
}
inline void memory_to_decoded_order(F (&v)[4]) {
  F out[4];
  for (int e = 0; e < 4 * kLanes; ++e) out[e % 4].lane[e / 4] = v[e / kLanes].lane[e % kLanes];
  for (int j = 0; j < 4; ++j) v[j] = out[j];
}

// Four consecutive codes of a packed buffer in each lane: element 4i + j of the group is code j of lane i.
struct Codes {
  uint8_t code[4][kLanes];
};
// Loads from the low nibble of *packed on if `odd`, with only `bytes` bytes readable.
inline Codes load_codes(const uint8_t* packed, bool odd, int64_t bytes) {
  Codes c = {};
  for (int64_t e = 0; e < 4 * kLanes && (e + odd) / 2 < bytes; ++e)
    c.code[e % 4][e / 4] = static_cast<uint8_t>(code_at(packed, e + odd));
  return c;
}
inline Codes load_codes(const uint8_t* packed) { return load_codes(packed, false, 2 * kLanes); }

// The scaled values of a code, and with an offset. lookup<j> decodes code j of each lane.
struct Table {
  float value[kCodes];
};
inline Table scaled(const Table& t, F scale) {
  Table out;
  for (int i = 0; i < kCodes; ++i) out.value[i] = t.value[i] * scale.lane[0];
  return out;
}
inline Table add_offset(Table t, F offset) {
  for (float& value : t.value) value += offset.lane[0];
  return t;
}
inline Table values_of(const CodeTable& table) {
  Table t;
  for (int i = 0; i < kCodes; ++i) t.value[i] = table.value[i];
  return t;
}
template <int j>
inline F lookup(const Table& t, const Codes& c) {
  F v;
  for (int i = 0; i < kLanes; ++i) v.lane[i] = t.value[c.code[j][i]];
  return v;
}

// Elements 4i + j of a group: those before element `first` from a, the others from b.
template <int j>
inline F joined(int first, F a, F b) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] = 4 * i + j < first ? a.lane[i] : b.lane[i];
  return a;
}

// Random bits of elements 4*group .. 4*(group + kLanes) - 1.
inline void philox(uint64_t seed, uint64_t group, uint32_t* bits) {
  for (int i = 0; i < kLanes; ++i) {
    const Philox4 random = philox4x32_10(seed, group + static_cast<uint64_t>(i));
    for (int j = 0; j < 4; ++j) bits[4 * i + j] = random.lane[j];
  }
}

// Lanes that hold two words each (many_tokens/multiply-inl.h), if the set has them (avx512/panel.h). Here a lane holds
// one.
template <class W>
using TwoWords = W;

// Pairs of int16, multiplied and summed exactly in int32. A word of an operand is two elements of the summed dimension.
// Of each kColumns elements the words are, in memory order, elements (4i, 4i + 2) and (4i + 1, 4i + 3).
struct WordInt {
  using Word = int32_t;
  struct Vector {
    Word lane[kLanes];
  };
  using Sum = Vector;
  static Sum no_sum() { return {}; }
  static Vector load(const Word* p) {
    Vector v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = p[i];
    return v;
  }
  static Vector broadcast(const Word* p) {
    Vector v;
    for (Word& lane : v.lane) lane = *p;
    return v;
  }
  // The sums of the two products of each lane, added to `sum`.
  static Sum multiply_add(Vector a, Vector b, Sum sum) {
    for (int i = 0; i < kLanes; ++i)
      sum.lane[i] += first_of(a.lane[i]) * first_of(b.lane[i]) + second_of(a.lane[i]) * second_of(b.lane[i]);
    return sum;
  }
  static F to_floats(Sum sum) {
    F v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = static_cast<float>(sum.lane[i]);
    return v;
  }

  // 2 * kLanes elements, each times `inverse` and rounded: in memory order, or in words of a row (above). The latter
  // are bits in an F, which transposes them.
  template <class T>
  static Vector round_row(const T* p, F inverse) {
    Vector out;
    for (int i = 0; i < kLanes; ++i)
      out.lane[i] =
          pair(nearest(to_float(p[2 * i]) * inverse.lane[0]), nearest(to_float(p[2 * i + 1]) * inverse.lane[0]));
    return out;
  }
  template <class T>
  static F round_pairs(const T* p, F inverse) {
    F out;
    for (int i = 0; i < kLanes; ++i) {
      const T* const first = p + i / 2 * 4 + i % 2;
      const Word word =
          pair(nearest(to_float(first[0]) * inverse.lane[0]), nearest(to_float(first[2]) * inverse.lane[0]));
      __builtin_memcpy(&out.lane[i], &word, sizeof(word));
    }
    return out;
  }
  static void store(Word* p, Vector v) {
    for (int i = 0; i < kLanes; ++i) p[i] = v.lane[i];
  }
  static void store_bits(Word* p, F bits) { __builtin_memcpy(p, &bits, sizeof(bits)); }

  // The integers of a code, in the form from which a row's kColumns weights are decoded to words.
  struct Values {
    int16_t value[kCodes];
  };
  static Values values_of(const int16_t* value) {
    Values v;
    for (int i = 0; i < kCodes; ++i) v.value[i] = value[i];
    return v;
  }
  // The words of each half of the columns stay together.
  static void decode_row(const Values& values, const uint8_t* packed, Word* out) {
    const auto value = [&](int i) { return values.value[code_at(packed, i)]; };
    for (int word = 0; word < 32; ++word) {
      const int first = word / 2 * 4 + word % 2;
      out[step_of(word)] = pair(value(first), value(first + 2));
    }
  }
  // Where decode_row puts a word that is word `word` in memory order.
  static constexpr int step_of(int word) { return word / 16 * 16 + word % 2 * 8 + word % 16 / 2; }

  // Decodes kColumns weights of two rows to words (row, next row) of lanes, in tiles of two vectors that lie
  // `tile_stride` words apart. The order of the lanes is that of decode_lanes in float32: 4 * kLanes columns after the
  // other, elements 4i + j in the order of j. `halves`: 32 columns after the other, even if that is half a group.
  static void decode_lanes(const Values& values, const uint8_t* packed, const uint8_t* next, bool halves, Word* out,
                           int64_t tile_stride) {
    const int group = halves && 4 * kLanes > 32 ? 32 : 4 * kLanes;
    for (int column = 0; column < 64; ++column) {
      const int lane = column / group * group + column % 4 * (group / 4) + column % group / 4;
      out[lane / (2 * kLanes) * tile_stride + lane % (2 * kLanes)] =
          pair(values.value[code_at(packed, column)], values.value[code_at(next, column)]);
    }
  }

  // Each int16 of v times that of `by`, in units of 2^15, rounded.
  static Vector multiply_fractions(Vector v, Vector by) {
    const auto product = [](int a, int b) { return (a * b + (1 << 14)) >> 15; };
    for (int i = 0; i < kLanes; ++i)
      v.lane[i] = pair(product(first_of(v.lane[i]), first_of(by.lane[i])),
                       product(second_of(v.lane[i]), second_of(by.lane[i])));
    return v;
  }

 private:
  static int first_of(Word word) { return static_cast<int16_t>(word & 0xFFFF); }
  static int second_of(Word word) { return static_cast<int16_t>(word >> 16); }
  static Word pair(int first, int second) {
    return static_cast<Word>((static_cast<uint32_t>(second) << 16) | (static_cast<uint32_t>(first) & 0xFFFFu));
  }
  static int nearest(float x) { return static_cast<int>(__builtin_lrintf(x)); }
};

}  // namespace panel
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
