// Stochastic rounding: one of the two values around a weight is drawn at random, such that the result equals the weight
// on average (Gupta et al., "Deep learning with limited numerical precision", 2015). Like everything in codes.h, this
// is exact float32 without contraction.
#pragma once

#include <cstdint>

#include "cpp/format/portable.h"

namespace qlora {

// The finalizer of MurmurHash3 (Appleby, 2011): a bijection on 32 bits that maps 0 to 0.
QLORA_HD uint32_t mix32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  return x ^ (x >> 16);
}

// The seed enters as two words: `before` the first product of mix32, and `behind` it. The words determine all 64 bits
// of the seed, so two seeds never share a stream. For a seed below 2^32, `behind` is 0.
struct SeedWords {
  uint32_t before, behind;
};
QLORA_HD SeedWords seed_words(uint64_t seed) {
  const uint32_t high = static_cast<uint32_t>(seed >> 32);
  return {static_cast<uint32_t>(seed) + high * 0xC2B2AE3Du, mix32(high)};
}

// The number of an element, spread over 32 bits. It grows by kElementStep from an element to the next one, except where
// the low word of the index wraps.
inline constexpr uint32_t kElementStep = 0x9E3779B1u;
QLORA_HD uint32_t element_word(uint64_t index) {
  return static_cast<uint32_t>(index) * kElementStep + static_cast<uint32_t>(index >> 32) * 0x85EBCA77u;
}

// Returns the random number of element `index`: from 2^-17 to 1 - 2^-17, in steps of 2^-16. Its distance from 0 and 1
// exceeds all rounding errors, so a weight that equals a code's value always gets that code.
//
// The element's number passes through mix32, whose last step would change the low half alone, which is not used. The
// words of the seed are the same for every element, so compilers compute them once per call.
QLORA_HD float rounding_threshold(uint64_t seed, uint64_t index) {
  const SeedWords words = seed_words(seed);
  uint32_t x = element_word(index) ^ words.before;
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu + words.behind;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  return (static_cast<float>(x >> 16) + 0.5f) * (1.0f / 65536.0f);
}

}  // namespace qlora
