// The code tables on the device. They live in constant memory; a kernel that looks codes up per lane copies what it
// needs to shared memory first, because constant memory serves one address a cycle.
#pragma once

#include <cstdint>
#include <limits>

#include "cpp/format/dynamic8.h"
#include "cpp/format/nf4.h"

namespace qlora::tile {

static __constant__ Nf4Table c_nf4{};
static __constant__ Dynamic8Table c_dynamic8{};

// NF4 encode by lookup. q in [-1, 1] falls into one of 32 cells, each holding at most one decision boundary, so
//   code = base[cell] + (q > boundary[cell])
// is exact, and 32 words lie in 32 banks: a warp's gather never conflicts.
//
// The cell comes from j = round(62 q + 62), 0..124, computed by adding 2^23 so that j lands in the low mantissa bits:
// (j & 0x7C) is 4 * cell, the byte offset itself. Any monotone map would do; this one costs two instructions.
struct Nf4EncodeTable {
  static constexpr int kCells = 32;
  static constexpr float kSlope = 62.0f;
  static constexpr float kShift = 62.0f + 8388608.0f;
  static constexpr uint32_t kOffsetMask = 0x7C;
  static constexpr int kBytes = 2 * kCells * 4;  // also the alignment the masked offset relies on

  float boundary[kCells] = {};
  uint32_t base[kCells] = {};

  constexpr Nf4EncodeTable() : Nf4EncodeTable(kNf4.boundary, kCodes - 1) {}

  // The same for other places at which codes change, in (-1, 1).
  constexpr Nf4EncodeTable(const float* boundaries, int count) {
    for (int cell = 0; cell < kCells; ++cell) {
      boundary[cell] = std::numeric_limits<float>::infinity();  // which no q is above
      for (int i = 0; i < count; ++i) {
        base[cell] += cell_of(boundaries[i]) < cell;
        if (cell_of(boundaries[i]) == cell) boundary[cell] = boundaries[i];
      }
    }
  }

  static constexpr int cell_of(float q) { return static_cast<int>(62.0 * q + 62.0 + 0.5) >> 2; }

  // No boundary shares its cell with another, or lies so near a cell's edge that its cell depends on how j is rounded.
  static constexpr bool is_exact(const float* boundaries, int count) {
    for (int i = 0; i < count; ++i) {
      const double j = 62.0 * boundaries[i] + 62.0;
      if (static_cast<int>(j + 0.501) != static_cast<int>(j + 0.499)) return false;
      if (i && cell_of(boundaries[i]) == cell_of(boundaries[i - 1])) return false;
    }
    return true;
  }
};
static_assert(sizeof(Nf4EncodeTable) == Nf4EncodeTable::kBytes && Nf4EncodeTable::is_exact(kNf4.boundary, kCodes - 1));

static __constant__ Nf4EncodeTable c_nf4_encode{};

// Copies a constant table into shared memory, a word a thread. The CTA has at least kWords threads, and synchronises
// after.
template <int kWords, class Word>
__device__ __forceinline__ void stage_table(Word (&shared)[kWords], const Word (&table)[kWords]) {
  if (threadIdx.x < kWords) shared[threadIdx.x] = table[threadIdx.x];
}

}  // namespace qlora::tile
