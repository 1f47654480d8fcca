// Decodes two values per lookup, as float32. Kernels use it if the scale must be applied to the weight itself: their
// sum runs over rows, so a quantization block has no partial sum of its own.
//
// Entry e of the table's 256 holds (value[e >> 4], value[e & 15]), in 16 copies of 8 bytes. Each of the 16 lanes of a
// half warp reads its own copy, so there are no bank conflicts. Entries lie 256 bytes apart, and the copies fill the
// first 128 bytes. The address of (entry, copy) is then `entry << 8 | copy * 8`, which one prmt builds from the byte
// that holds the entry. The kernel may use the other 128 bytes of each entry.
#pragma once

#include <cstdint>

#include "cpp/format/packing.h"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/prmt.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/tile/generic/code_tables.cuh"

namespace qlora::tile {

inline constexpr int kPairF32Entries = 256;
inline constexpr int kPairF32EntryBytes = 256;
inline constexpr int kPairF32CopiesBytes = 128;
inline constexpr int kPairF32Bytes = kPairF32Entries * kPairF32EntryBytes;

// Fills the table. Call from all threads of the CTA, and synchronize afterwards. The values are read before the stores,
// outside of the branch on the code: within it, ptxas would read the constants again for every store.
template <int kThreads>
__device__ __forceinline__ void fill_pairs_f32(char* table, const CodeView& code) {
  static_assert(kThreads >= kPairF32Entries);
  const int entry = threadIdx.x;
  if (kThreads > kPairF32Entries && entry >= kPairF32Entries) return;
  float high, low;
  code.with_values([&](const auto& value_of) { high = value_of(entry / kCodes), low = value_of(entry % kCodes); });
  float4* const to = reinterpret_cast<float4*>(table + entry * kPairF32EntryBytes);
  // Neighbouring threads write different 16-byte pieces of their entries at a time, which avoids bank conflicts.
#pragma unroll
  for (int piece = 0; piece < kPairF32CopiesBytes / 16; ++piece)
    to[piece ^ (entry & 7)] = make_float4(high, low, high, low);
}

// Looks up the pair of byte kByte of `codes`. `table` is the shared address, and `copy` is 8 * (lane % 16).
template <int kByte>
__device__ __forceinline__ float2 lookup_pair_f32(uint32_t table, uint32_t copy, uint32_t codes) {
  return ptx::load_shared_v2_f32(table + ptx::prmt<0x3200u | (4 + kByte) << 4>(copy, codes));
}

}  // namespace qlora::tile
