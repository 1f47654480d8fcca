// Operands of wgmma and tcgen05.mma in shared memory, which a matrix descriptor describes.
#pragma once
#include <string>
#include <type_traits>

#include "fragments.h"
#include "machine.h"

namespace cudasim {

// Where the 16-byte granule `c` of row `r` lies (see the PTX ISA's canonical layouts). In the K-major form rows are M
// or N and granules run along K; in the MN-major form rows are K and granules run along M or N.
struct MatrixDescriptor {
  uint32_t start, lbo, sbo, base, mode;  // mode: 0 none, 1 32B, 2 64B, 3 128B
  MatrixDescriptor(uint64_t d, uint32_t swizzle_mode)
      : start(uint32_t(d & 0x3fff) << 4),
        lbo(uint32_t(d >> 16 & 0x3fff) << 4),
        sbo(uint32_t(d >> 32 & 0x3fff) << 4),
        base(uint32_t(d >> 49 & 7)),
        mode(swizzle_mode) {}
  uint32_t swizzle(uint32_t a) const {
    if (!mode) return a;
    uint32_t row = (a >> 7) - base;
    return a ^ ((row & ((1u << mode) - 1)) << 4);
  }
  uint32_t k_major(uint32_t row, uint32_t c) const {
    uint32_t pitch = 16u << mode;
    return swizzle(start + (row & 7) * pitch + (row >> 3) * sbo + c * (mode ? 16 : lbo));
  }
  uint32_t mn_major(uint32_t k, uint32_t c) const {
    if (!mode) return start + c * sbo + (k & 7) * 16 + (k >> 3) * lbo;
    uint32_t per = 1u << mode;
    return swizzle(start + (c & (per - 1)) * 16 + (c >> mode) * lbo + (k & 7) * (16u << mode) + (k >> 3) * sbo);
  }
};

// A descriptor takes (address & 0x3FFFF) >> 4. In a cluster, bits 24.. of the address hold the rank of the CTA. Without
// the mask they reach the leading dimension: swizzled K-major layouts ignore it, so that no result shows the mistake.
inline void check_mask(const Warp& w, const MatrixDescriptor& d, const char* instruction) {
  const uint32_t rank = w.blk->rank;
  if (rank && d.mode && d.lbo >> 8 == rank)
    fault(Fault::shared_out_of_bounds, 0,
          std::string(instruction) + " descriptor with the rank of the block, " + std::to_string(rank) +
              ", in its leading dimension: the shared address has to be masked with 0x3FFFF before >> 4");
}

// The offset of a granule in the CTA's shared memory.
inline uint32_t granule_offset(const Block& b, uint32_t addr, const char* instruction) {
  const uint32_t off = addr - kSharedBase;
  if (uint64_t(off) + 16 > b.shared_bytes)
    fault(Fault::shared_out_of_bounds, 0,
          std::string(instruction) + " descriptor reaches shared address " + hex(addr) + ", outside the block's " +
              std::to_string(b.shared_bytes) + " bytes");
  return off;
}

// 16 bytes of elements as floats or ints; returns how many.
template <class T>
int expand(const uint8_t* p, Ty t, T* out) {
  int n = 0;
  if constexpr (std::is_same_v<T, float>)
    if (t == Ty::f16 || t == Ty::bf16) {
      _mm256_storeu_ps(out, half8(p, t == Ty::bf16));
      return 8;
    }
  for (int i = 0; i < 4; ++i) {
    uint32_t v;
    memcpy(&v, p + 4 * i, 4);
    if constexpr (std::is_same_v<T, float>)
      unpack_floats(v, t, out + n);
    else
      unpack_ints(v, t, out + n);
    n += 32 / element_bits(t);
  }
  return n;
}

// Rows of 32 bytes as out[row][k]. granule(address) is a pointer to 16 bytes, and may check the access.
template <class T, class G>
void load_rows(const MatrixDescriptor& d, bool mn_major, Ty t, uint32_t first, uint32_t rows, G granule, T* out) {
  const uint32_t per = uint32_t(128 / element_bits(t)), K = 2 * per;
  T x[16];
  if (!mn_major) {
    for (uint32_t r = 0; r < rows; ++r)
      for (uint32_t c = 0; c < 2; ++c) expand(granule(d.k_major(first + r, c)), t, out + r * K + c * per);
    return;
  }
  for (uint32_t k = 0; k < K; ++k)
    for (uint32_t c = 0; c < rows / per; ++c) {
      expand(granule(d.mn_major(k, first / per + c)), t, x);
      for (uint32_t i = 0; i < per; ++i) out[(c * per + i) * K + k] = x[i];
    }
}

// The same rows in groups of 8, as out[row / 8][k][row % 8].
template <class T, class G>
void load_groups(const MatrixDescriptor& d, bool mn_major, Ty t, uint32_t rows, G granule, T* out) {
  const uint32_t per = uint32_t(128 / element_bits(t)), K = 2 * per;
  T x[16];
  if (mn_major) {
    for (uint32_t k = 0; k < K; ++k)
      for (uint32_t c = 0; c < rows / per; ++c) expand(granule(d.mn_major(k, c)), t, out + c * K * 8 + k * 8);
    return;
  }
  if constexpr (std::is_same_v<T, float>)
    if (t == Ty::f16 || t == Ty::bf16) {
      for (uint32_t j = 0; j < rows / 8; ++j)
        for (uint32_t c = 0; c < 2; ++c) {
          __m256 v[8];
          for (uint32_t i = 0; i < 8; ++i) v[i] = half8(granule(d.k_major(8 * j + i, c)), t == Ty::bf16);
          transpose8(v);
          for (uint32_t i = 0; i < 8; ++i) _mm256_storeu_ps(out + (j * K + 8 * c + i) * 8, v[i]);
        }
      return;
    }
  for (uint32_t r = 0; r < rows; ++r)
    for (uint32_t c = 0; c < 2; ++c) {
      expand(granule(d.k_major(r, c)), t, x);
      T* to = out + (r / 8) * K * 8 + (c * per) * 8 + r % 8;
      for (uint32_t i = 0; i < per; ++i) to[i * 8] = x[i];
    }
}

}  // namespace cudasim
