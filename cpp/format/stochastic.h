// Stochastic rounding to NF4: which of the two values around a weight is taken is drawn, so that it is the weight on
// the average (Gupta et al., "Deep learning with limited numerical precision", 2015). Exact float32, without
// contraction, as all of nf4.h.
#pragma once

#include <cstdint>

#include "cpp/format/nf4.h"

namespace qlora {

// The random number of element `index`, from 2^-17 to 1 - 2^-17 in steps of 2^-16: as far from both ends as rounding
// errors reach, so that a weight that is a code's value keeps the code. The mixing is MurmurHash3's (Appleby, 2011).
QLORA_HD float rounding_threshold(uint64_t seed, uint64_t index) {
  uint32_t x = static_cast<uint32_t>(index) * 0x9E3779B1u + static_cast<uint32_t>(index >> 32) * 0x85EBCA77u;
  x ^= static_cast<uint32_t>(seed) + static_cast<uint32_t>(seed >> 32) * 0xC2B2AE3Du;
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  x ^= x >> 16;
  return (static_cast<float>(x >> 16) + 0.5f) * (1.0f / 65536.0f);
}

// Values and the way from each to the next.
struct Nf4Gaps {
  float gap[kCodes - 1] = {};

  constexpr Nf4Gaps() {
    for (int i = 0; i + 1 < kCodes; ++i) gap[i] = kNf4.value[i + 1] - kNf4.value[i];
  }
};
inline constexpr Nf4Gaps kNf4Gaps{};

}  // namespace qlora
