// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). Dropout's random bits are a pure
// function of the seed and the element index. So forward, backward, CPU and CUDA draw the same mask, and no mask is
// stored.
#pragma once

#include <cstdint>

#include "cpp/format/portable.h"

namespace qlora {

struct Philox4 {
  uint32_t lane[4];
};

// Returns the random bits of elements 4*group .. 4*group+3.
QLORA_HD Philox4 philox4x32_10(uint64_t seed, uint64_t group) {
  uint32_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(group >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Dropout. Element `index` (its row-major index in x [M, K]) is dropped if its 32 random bits, as an integer, are below
// `threshold` = round(p * 2^32). Elements that are kept are scaled by `keep_scale` = 1 / (1 - p), in float32 after the
// sum.
struct Dropout {
  uint64_t threshold = 0;   // 0: no dropout; 2^32: everything is dropped
  double keep_scale = 1.0;  // 0 if everything is dropped
  uint64_t seed = 0;
  const int64_t* device_seed = nullptr;  // CUDA: the seed's address in device memory, or null to use `seed`
  int64_t first = 0;                     // CPU: the index of the kernels' element 0, if they see only some rows of x

  QLORA_HD uint64_t key() const { return device_seed != nullptr ? static_cast<uint64_t>(*device_seed) : seed; }
  QLORA_HD bool active() const { return threshold != 0; }
  QLORA_HD bool keeps(uint32_t bits) const { return bits >= threshold; }
};

QLORA_INLINE Dropout make_dropout(double p, uint64_t seed) {
  Dropout d;
  d.threshold = static_cast<uint64_t>(p * 4294967296.0 + 0.5);
  d.keep_scale = p < 1.0 ? 1.0 / (1.0 - p) : 0.0;
  d.seed = seed;
  return d;
}

}  // namespace qlora
