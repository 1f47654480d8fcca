// dynamic8_encode in one table look-up and one comparison.
//
// The magnitudes from 2^-22 to 1 are cut into 64 cells an octave, so narrow that a cell holds at most one decision
// boundary: the code of a value is that of its cell's lower end, or one more.
#pragma once

#include <cstdint>

#include "cpp/format/dtypes.h"
#include "cpp/format/dynamic8.h"

namespace qlora::cpu {

struct Dynamic8Cells {
  static constexpr int kOctaves = 22, kCellsPerOctave = 64, kCells = kOctaves * kCellsPerOctave + 1;
  static constexpr int kCellShift = 17;  // drops the low mantissa bits: 2^(23 - 17) = kCellsPerOctave
  static constexpr uint32_t kOneBits = 0x3F800000u, kLeastBits = kOneBits - (uint32_t{kOctaves} << 23);

  uint8_t base[2][kCells] = {};  // [sign][cell]: the number of boundaries below every value of the cell
  bool separate = true;          // no cell holds two boundaries

  constexpr Dynamic8Cells() {
    int below = 0, not_above = 254;  // boundaries below the positive cell; and the last one up to the negative cell
    for (int cell = 0; cell < kCells; ++cell) {
      const float low = edge(cell), high = edge(cell + 1);
      while (below < 254 && kDynamic8.boundary[below] < low) ++below;
      while (not_above >= 0 && kDynamic8.boundary[not_above] > -high) --not_above;
      base[0][cell] = static_cast<uint8_t>(below);
      base[1][cell] = static_cast<uint8_t>(not_above + 1);
      separate &= below >= 254 || kDynamic8.boundary[below + 1] >= high;
      separate &= kDynamic8.boundary[not_above + 2] > -low;
    }
  }

 private:
  static constexpr float edge(int cell) {
    float octave = 1.0f;
    for (int i = cell / kCellsPerOctave; i < kOctaves; ++i) octave *= 0.5f;
    for (int i = kOctaves; i < cell / kCellsPerOctave; ++i) octave *= 2.0f;
    return octave * (1.0f + static_cast<float>(cell % kCellsPerOctave) / kCellsPerOctave);
  }
};
inline constexpr Dynamic8Cells kDynamic8Cells{};
static_assert(kDynamic8Cells.separate);

}  // namespace qlora::cpu
