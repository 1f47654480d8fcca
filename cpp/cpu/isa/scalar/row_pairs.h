// stream::'s words for weight rows in pairs, in plain C++.
//
// dx sums over weight rows, so a lane multiplies the codes of two rows and adds the products. Of 64 columns of an upper
// and a lower row, a lane holds four columns of both, one row per word.
//
// clang-format off
//   lane l          | high word: row `lower`  | low word: row `upper`   |
//   nibble s        |   3     2     1     0   |   3     2     1     0   |
//   column 4l +     |   2     3     0     1   |   2     3     0     1   |
// clang-format on
#pragma once

#include "cpp/cpu/isa/scalar/stream.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace stream {

inline constexpr int kMaxDxTokens = 2;  // at once; few, to keep the code small

inline int32_t word_of(const uint8_t* row, int i) { return row[2 * i] | row[2 * i + 1] << 8; }

[[gnu::noinline]] inline Ints load_row_pair(const uint8_t* upper, const uint8_t* lower) {
  return each_lane<Ints>([&](int i) { return pair(word_of(upper, i), word_of(lower, i)); });
}
// Decodes nibble s of every word to a pair of int16. The upper row's is in the low half.
template <int s>
[[gnu::noinline]] inline Ints decode_nibble(const Ints& words, const IntCodebook& book) {
  return each_lane<Ints>(
      [&](int i) { return pair(book.values[nibble(words, i, s)], book.values[nibble(words, i, 4 + s)]); });
}
// Stores the 64 columns in memory order, given column 4l + (s ^ 1) in lane l of of_nibble[s].
[[gnu::noinline]] inline void store_in_order(const Floats (&of_nibble)[4], float* out) {
  for (int i = 0; i < kLanes; ++i)
    for (int s = 0; s < 4; ++s) out[4 * i + (s ^ 1)] = of_nibble[s].lane[i];
}
// Loads the words of one row, one per lane, and decodes nibble s of each to float32.
[[gnu::noinline]] inline Ints load_words(const uint8_t* row) {
  return each_lane<Ints>([&](int i) { return word_of(row, i); });
}
template <int s>
[[gnu::noinline]] inline Floats decode_nibble(const Ints& words, const FloatCodebook& book) {
  return each_lane<Floats>([&](int i) { return book.values[nibble(words, i, s)]; });
}

// The bits of |x| as an integer, which is nearly linear in log2 |x|.
[[gnu::noinline]] inline Ints magnitude_bits(const Floats& x) {
  return each_lane<Ints>([&](int i) { return static_cast<int32_t>(magnitude_of_lane(x, i)); });
}
[[gnu::noinline]] inline Ints max_ints(const Ints& a, const Ints& b) {
  return each_lane<Ints>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
// x where number < limit, else -infinity.
[[gnu::noinline]] inline Floats where_less(const Ints& number, uint32_t limit, const Floats& x) {
  return each_lane<Floats>(
      [&](int i) { return number.lane[i] < static_cast<int32_t>(limit) ? x.lane[i] : -__builtin_inff(); });
}
// A bit for each lane where a >= b, without NaN.
[[gnu::noinline]] inline uint32_t lanes_at_least(const Floats& a, const Floats& b) {
  uint32_t lanes = 0;
  for (int i = 0; i < kLanes; ++i) lanes |= static_cast<uint32_t>(a.lane[i] >= b.lane[i]) << i;
  return lanes;
}
inline uint32_t first_lane_bits(int64_t count) { return count >= kLanes ? 0xFFFFu : (1u << count) - 1u; }
// Rounds the lanes whose bit is set. The others are 0.
[[gnu::noinline]] inline Ints round_to_ints(const Floats& x, uint32_t lanes) {
  return each_lane<Ints>([&](int i) { return lanes >> i & 1 ? static_cast<int32_t>(__builtin_lrintf(x.lane[i])) : 0; });
}
[[gnu::noinline]] inline Ints splat_pair(int32_t pair) {
  return each_lane<Ints>([&](int) { return pair; });
}
[[gnu::noinline]] inline void store_pairs(int32_t* p, const Ints& low, const Ints& high) {
  for (int i = 0; i < kLanes; ++i) p[i] = pair(low.lane[i], high.lane[i]);
}

// The integer part of |x|, at most `most`, one byte per lane; 0 for NaN.
[[gnu::noinline]] inline void store_units(uint8_t* p, const Floats& x, float most) {
  for (int i = 0; i < kLanes; ++i) {
    const float magnitude = bits_float(magnitude_of_lane(x, i));
    p[i] = static_cast<uint8_t>(magnitude < most ? magnitude : magnitude >= most ? most : 0.0f);
  }
}
// Adds `units` to the bytes of those of 64 columns whose code in `row` is one of `codes`, up to 255. The order of the
// columns depends on the instruction set.
[[gnu::noinline]] inline Ints add_where_in(const CodeSet& codes, const Ints& sums, const uint8_t* row, uint8_t units) {
  uint8_t byte[4 * kLanes];
  std::memcpy(byte, sums.lane, sizeof byte);
  for (int i = 0; i < 4 * kLanes; ++i) {
    const int code = i % 2 ? row[i / 2] & 15 : row[i / 2] >> 4;
    const int sum = byte[i] + (codes.has[code] ? units : 0);
    byte[i] = static_cast<uint8_t>(sum < 255 ? sum : 255);
  }
  Ints r;
  std::memcpy(r.lane, byte, sizeof byte);
  return r;
}
[[gnu::noinline]] inline bool all_bytes_at_least(const Ints& sums, int bound) {
  uint8_t byte[4 * kLanes];
  std::memcpy(byte, sums.lane, sizeof byte);
  for (uint8_t b : byte)
    if (b < bound) return false;
  return true;
}

}  // namespace stream
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
