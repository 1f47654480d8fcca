// dynamic8_encode with one table look-up and no comparison.
//
// Magnitudes from 2^-22 to 1 are cut into 64 cells per octave, so narrow that a cell holds at most one decision
// boundary. A float's high bits are its cell, and its low kLowBits the place p in the cell. The entry of a positive
// cell with code c at its lower end and a boundary at place b is (c + 1) * 2^kLowBits - 1 - b. Adding p leaves c + (p >
// b) above the low bits. In a negative cell codes fall as p grows, so ~p is added.
#pragma once

#include <cstdint>

#include "cpp/format/dynamic8.h"

namespace qlora::cpu {

struct Dynamic8Cells {
  static constexpr int kLowBits = 17, kCellsPerOctave = 1 << (23 - kLowBits), kOctaves = 22;
  static constexpr int kCells = kOctaves * kCellsPerOctave + 1;  // the last is for 1 alone
  static constexpr int32_t kLowMask = (1 << kLowBits) - 1;
  static constexpr int32_t kLeastBits = 0x3F800000 - (kOctaves << 23), kRange = kOctaves << 23;

  int32_t entry[2 * kCells] = {};  // positive cells, then negative ones
  bool separate = true;            // no cell holds two boundaries

  constexpr Dynamic8Cells() {
    int up = 0, down = 255;  // boundaries below the positive cell; boundaries below the negative one
    for (int cell = 0; cell < kCells; ++cell) {
      const float low = lower_end(cell), high = lower_end(cell + 1);
      while (up < 255 && kDynamic8.boundary[up] < low) ++up;
      while (down > 0 && kDynamic8.boundary[down - 1] > -high) --down;
      const bool up_inside = up < 255 && kDynamic8.boundary[up] < high;
      const bool down_inside = kDynamic8.boundary[down] <= -low;
      entry[cell] = (up << kLowBits) + (up_inside ? kLowMask - place(kDynamic8.boundary[up]) : 0);
      entry[kCells + cell] = ((down + 1) << kLowBits) + (down_inside ? place(kDynamic8.boundary[down]) : 0);
      separate &= up >= 254 || kDynamic8.boundary[up + 1] >= high;
      separate &= kDynamic8.boundary[down + 1] > -low;
    }
  }

 private:
  static constexpr int32_t place(float x) { return __builtin_bit_cast(int32_t, x) & kLowMask; }
  static constexpr float lower_end(int cell) { return __builtin_bit_cast(float, kLeastBits + (cell << kLowBits)); }
};
inline constexpr Dynamic8Cells kDynamic8Cells{};
static_assert(kDynamic8Cells.separate);

}  // namespace qlora::cpu
