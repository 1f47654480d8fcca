// Reads wide codes, those of more than 4 bits, as float32. This is the only CPU code that knows their layout
// (cpp/format/packing.h) and their values (WideCode in cpp/format/codes.h). It is written with the compiler's vectors,
// which all instruction sets have.
//
// Four elements are in a lane, as they are in a dword of bytes: lane i of vector j is element 4i + j of a group. Blocks
// have at least 16 elements, so a lane has one scale. Groups begin at multiples of kGroup in their row, and rows are
// whole blocks. So a group is a part of a block, or begins with one.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/isa/unit_codes.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/format/problem.h"

// A set whose registers are smaller than these vectors would pass them otherwise than another set. None of them leaves
// the file.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace qlora::cpu::QLORA_ISA {
namespace {

// Calls use.operator()<bits, kind>() with the constants of a wide code.
template <class Use>
inline void with_wide(const WideCode& wide, const Use& use) {
  using Kind = WideCode::Kind;
  if (wide.bits == 5) return use.template operator()<5, Kind::kInteger>();
  if (wide.bits == 6) return use.template operator()<6, Kind::kInteger>();
  if (wide.kind == Kind::kE4m3) return use.template operator()<8, Kind::kE4m3>();
  if (wide.kind == Kind::kE5m2) return use.template operator()<8, Kind::kE5m2>();
  use.template operator()<8, Kind::kInteger>();
}

template <class T, int kLanes>
struct VectorOf {
  using Type [[gnu::vector_size(sizeof(T) * kLanes)]] = T;
};

template <int kLanes>
class WideReader {
 public:
  static constexpr int kGroup = 4 * kLanes;
  using Dwords = typename VectorOf<uint32_t, kLanes>::Type;
  using Floats = typename VectorOf<float, kLanes>::Type;

  WideReader() = default;
  explicit WideReader(const Weight& w)
      : packed_(w.packed),
        end_(w.packed + packed_bytes(w.n * w.k, w.bits())),
        zero_(wide_code(w.code).zero),
        shift_(__builtin_ctzll(static_cast<uint64_t>(w.scales.block_size))) {}

  // The bytes of a group, and where the one that begins at element `begin`, a multiple of kGroup or of kUnit, has its.
  // A group smaller than a unit has those of its unit.
  template <int kBits>
  static constexpr int kBytes = kBits == 8 ? kGroup : max(kGroup / kUnit, 1) * static_cast<int>(unit_bytes(kBits));
  template <int kBits>
  const uint8_t* at(int64_t begin) const {
    return packed_ + (kBits == 8 ? begin : begin / kUnit * unit_bytes(kBits));
  }

  // The values of the codes of the group of elements whose bytes are at `group`. Elements beyond the weight have any
  // values. `first` is the group's first element in its unit, if it is smaller than one.
  template <int kBits, WideCode::Kind kind>
  [[gnu::always_inline]] void values(const uint8_t* group, Floats (&v)[4], int first = 0) const {
    uint8_t last[kBytes<kBits>];
    if (end_ - group < kBytes<kBits>) [[unlikely]] {
      std::memset(last, 0, sizeof last);
      std::memcpy(last, group, static_cast<size_t>(max(end_ - group, 0)));
      group = last;
    }
    codes<kBits>(group, first, [&](auto j, Dwords code) { v[j.value] = value<kind>(code); });
  }

  // In each lane of a group, the entry of its block. `of_block` points to that of the group's first block, and kLanes
  // floats may be read from there on.
  Floats of_lanes(const float* of_block) const {
    Floats blocks;
    std::memcpy(&blocks, of_block, sizeof blocks);
#if defined(__clang__)
    Floats v;
    for (int i = 0; i < kLanes; ++i) v[i] = blocks[4 * i >> shift_];
    return v;
#else
    return __builtin_shuffle(blocks, lanes() * 4 >> shift_);
#endif
  }

  // The weights of the group that begins at element `begin`. `scale` points to the scale of its first block. Offsets
  // lie `to_offset` floats further on; without them, it is 0.
  template <int kBits, WideCode::Kind kind>
  [[gnu::always_inline]] void decode(int64_t begin, const float* scale, int64_t to_offset, Floats (&v)[4]) const {
    values<kBits, kind>(at<kBits>(begin), v, static_cast<int>(begin % kUnit));
    const Floats by = of_lanes(scale);
    for (Floats& x : v) x *= by;
    if (to_offset) {
      const Floats offset = of_lanes(scale + to_offset);
      for (Floats& x : v) x += offset;
    }
  }

  // Sets the lanes of a group's elements from number `count` on, a multiple of 16, to zero.
  static void keep_first(int64_t count, Floats& x) { x = lanes() < static_cast<uint32_t>(count / 4) ? x : Floats{}; }

 private:
  static constexpr Dwords splat(uint32_t x) { return x - Dwords{}; }
  static constexpr Dwords lanes() {
    Dwords number = {};
    for (int i = 0; i < kLanes; ++i) number[i] = static_cast<uint32_t>(i);
    return number;
  }
  static Floats as_floats(Dwords bits) { return reinterpret_cast<Floats>(bits); }
  template <class From>
  static Dwords widen(const void* bytes) {
    typename VectorOf<From, kLanes>::Type narrow;
    std::memcpy(&narrow, bytes, sizeof narrow);
    if constexpr (sizeof(From) == 1) {  // GCC 12 converts bytes to dwords one by one
      return __builtin_convertvector(__builtin_convertvector(narrow, typename VectorOf<uint16_t, kLanes>::Type),
                                     Dwords);
    } else {
      return __builtin_convertvector(narrow, Dwords);
    }
  }

  // Calls use(j, the codes of elements 4i + j) for j = 0 .. 3.
  template <int kBits, class Use>
  static void codes(const uint8_t* group, int first, const Use& use) {
    if constexpr (kBits == 8 || (panel::UnitCodes<kBits>::kServes && kLanes == panel::kLanes)) {
      Dwords four;
      if constexpr (kBits == 8) {
        std::memcpy(&four, group, sizeof four);
      } else {
        four = reinterpret_cast<Dwords>(panel::UnitCodes<kBits>::of(group));
      }
      unroll<4>([&](auto j) { use(j, j.value == 3 ? four >> 24 : (four >> 8 * j.value) & 255); });
    } else {
      // Bytes of the planes, a lane's side by side.
      constexpr int kHere = kGroup < kUnit ? kGroup : kUnit, kUpper = kBits - 4;
      if (kGroup >= kUnit) first = 0;
      uint8_t low[kGroup / 2], upper[kGroup / 8 * kUpper];
      for (int u = 0; u < kGroup / kHere; ++u, group += unit_bytes(kBits)) {
        std::memcpy(low + u * kHere / 2, group + first / 2, kHere / 2);
        std::memcpy(upper + u * kHere / 8 * kUpper, group + kUnit / 2 + first / 8 * kUpper, kHere / 8 * kUpper);
      }
      const Dwords nibbles = widen<uint16_t>(low), high = upper_of_lanes<kUpper>(upper);
      constexpr int kNibble[4] = {4, 0, 12, 8};
      unroll<4>([&](auto j) {
        use(j, ((nibbles >> kNibble[j.value]) & 15) | (high >> kUpper * j.value & ((1 << kUpper) - 1)) << 4);
      });
    }
  }

  // The upper bits of each lane's four elements, in the lowest bits of the lane.
  template <int kUpper>
  static Dwords upper_of_lanes(const uint8_t* upper) {
    if constexpr (kUpper == 2) return widen<uint8_t>(upper);
    Dwords words = {};
    for (int first = 0; first < kLanes; first += 8) {
      uint32_t word = 0;
      std::memcpy(&word, upper + first / 2, kLanes < 8 ? kLanes / 2 : 4);
      words = first == 0 ? splat(word) : lanes() >= static_cast<uint32_t>(first) ? splat(word) : words;
    }
    return words >> (lanes() & 7) * 4;
  }

  template <WideCode::Kind kind>
  Floats value(Dwords code) const {
    if constexpr (kind == WideCode::Kind::kInteger) {
      // 2^23 + code, whose last bits are those of the code
      constexpr uint32_t kBits = 0x4B000000;
      return as_floats(code | kBits) - (0x1p23f + static_cast<float>(zero_));
    } else {
      // The bits below the sign, moved to where float32 has them, and the exponent moved from this bias to that of
      // float32. Subnormal numbers are integers times their unit.
      constexpr bool kIsE4m3 = kind == WideCode::Kind::kE4m3;
      constexpr int kMantissa = kIsE4m3 ? 3 : 2, kBias = kIsE4m3 ? 7 : 15;
      constexpr uint32_t kRebias = (127 - kBias) << 23, kSpecial = kIsE4m3 ? 127 : 124;
      constexpr float kUnit = kIsE4m3 ? 0x1p-9f : 0x1p-16f;
      const Dwords magnitude = code & 127, moved = magnitude << (23 - kMantissa);
      const Floats normal = as_floats(moved + kRebias), subnormal = __builtin_convertvector(magnitude, Floats) * kUnit;
      const Floats special = kIsE4m3 ? as_floats(splat(0x7FF00000u)) : as_floats(moved + (2 * kRebias));
      const Floats found = magnitude < (1u << kMantissa) ? subnormal : magnitude >= kSpecial ? special : normal;
      return as_floats(reinterpret_cast<Dwords>(found) | (code & 128) << 24);
    }
  }

  const uint8_t *packed_ = nullptr, *end_ = nullptr;
  int zero_ = 0, shift_ = 0;
};

}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
