// The signed 8-bit dynamic map in which absmax is stored (Dettmers et al., "8-bit Optimizers via Block-wise
// Quantization", 2022; bitsandbytes' create_dynamic_map(signed=True, max_exponent_bits=7, total_bits=8)).
//
// For each exponent e = -6..0, the interval [0.1, 1] is cut into 2^(e+6) equal parts. The midpoints of the parts times
// 10^e, their negatives, 0 and 1 are the map's 256 values. The computation yields exactly the same float32 values as
// torch, and needs double intermediates because torch's linspace fuses its multiply and add.
#pragma once

#include <cstdint>

#include "cpp/format/portable.h"

namespace qlora {

inline constexpr int kDynamic8ZeroCode = 127;

struct Dynamic8Table {
  float value[256] = {};
  float boundary[255] = {};  // float32 midpoints of neighbouring values

  constexpr Dynamic8Table() {
    constexpr float kPower[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
    int j = 0;
    for (int e = 0; e < 7; ++e) {
      const int parts = 1 << e;
      const float step = (1.0f - 0.1f) / static_cast<float>(parts);
      for (int i = 0; i < parts; ++i, ++j) {
        const float mid = (edge(i, parts, step) + edge(i + 1, parts, step)) / 2.0f;
        value[kDynamic8ZeroCode + 1 + j] = kPower[e] * mid;
        value[kDynamic8ZeroCode - 1 - j] = -(kPower[e] * mid);
      }
    }
    value[255] = 1.0f;
    for (int i = 0; i < 255; ++i) boundary[i] = (value[i] + value[i + 1]) * 0.5f;
  }

 private:
  static constexpr float edge(int i, int parts, float step) {
    const double offset = static_cast<double>(step);
    return i < (parts + 1) / 2 ? static_cast<float>(static_cast<double>(0.1f) + offset * i)
                               : static_cast<float>(1.0 - offset * (parts - i));
  }
};
inline constexpr Dynamic8Table kDynamic8{};

// Returns the number of boundaries below q (binary search): a tie goes to the lower entry, NaN to entry 0.
QLORA_INLINE int dynamic8_encode(float q) {
  int code = 0;
  for (int step = 128; step; step >>= 1)
    if (code + step <= 255 && q > kDynamic8.boundary[code + step - 1]) code += step;
  return code;
}

// Every implementation must compute the same bits for the mean of absmax, so the order of summation is part of the
// format:
//   1. The values are divided into chunks of kMeanChunk.
//   2. Within a chunk, partial sum p (a double) adds the values p, p + kMeanLanes, ... in order.
//   3. The partial sums are added pairwise (p += p + half, half = kMeanLanes/2 .. 1).
//   4. The chunks' sums are added in order.
//   5. One division and one rounding follow.
inline constexpr int64_t kMeanLanes = 1024;
inline constexpr int64_t kMeanChunk = 65536;

}  // namespace qlora
