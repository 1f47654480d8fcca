// Stochastic rounding: which of the two values around a weight is taken is drawn, so that it is the weight on
// the average (Gupta et al., "Deep learning with limited numerical precision", 2015). Exact float32, without
// contraction, as all of codes.h.
#pragma once

#include <cstdint>

#include "cpp/format/portable.h"

namespace qlora {

// The finalizer of MurmurHash3 (Appleby, 2011): a bijection of 32 bits that keeps 0.
QLORA_HD uint32_t mix32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  return x ^ (x >> 16);
}

// The random number of element `index`, from 2^-17 to 1 - 2^-17 in steps of 2^-16: as far from both ends as rounding
// errors reach, so that a weight that equals a code's value keeps the code.
//
// The element's number passes through mix32. The seed enters as two words, `before` its first product and `behind` it.
// The words determine all 64 bits of the seed, so two seeds never share a stream. Both are the same for every element,
// and compilers compute them once per call. A seed below 2^32 has behind = 0.
QLORA_HD float rounding_threshold(uint64_t seed, uint64_t index) {
  const uint32_t seed_high = static_cast<uint32_t>(seed >> 32);
  const uint32_t before = static_cast<uint32_t>(seed) + seed_high * 0xC2B2AE3Du;
  const uint32_t behind = mix32(seed_high);
  uint32_t x = static_cast<uint32_t>(index) * 0x9E3779B1u + static_cast<uint32_t>(index >> 32) * 0x85EBCA77u;
  x ^= before;
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu + behind;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  x ^= x >> 16;
  return (static_cast<float>(x >> 16) + 0.5f) * (1.0f / 65536.0f);
}

}  // namespace qlora
