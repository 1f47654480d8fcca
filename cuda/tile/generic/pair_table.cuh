// Decodes packed codes with a table of pairs in shared memory. One prmt and one load yield two weights as the two
// halves of a register, ready to be an operand of mma.
//
// Entry v (0..255) is the pair that byte v packs: the value of its high nibble in the lower half, that of its low
// nibble in the upper half. Entries are 256 bytes apart, so the address is the packed byte moved up by one byte (prmt),
// with the lane in the lowest byte. An entry holds 32 copies, one per lane, so 32 lanes that look up 32 different bytes
// have no bank conflicts. The second 128 bytes of each entry are not touched.
//
// The table stores round(value * factor). The factor (PairFactors) is chosen so that the 16 scaled values lie close to
// numbers of the 16-bit type. For NF4 this makes the weight's error about two thirds of the error from rounding value *
// absmax. The sums of products are therefore multiplied by absmax / factor.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <mutex>
#include <type_traits>

#include "cpp/format/codes.h"
#include "cpp/format/dtypes.h"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/prmt.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/tile/generic/code_tables.cuh"

namespace qlora::tile {

inline constexpr int kPairTableEntryBytes = 256;
inline constexpr int kPairTableCopies = 32;
inline constexpr int kPairTableBytes = 256 * kPairTableEntryBytes;

// Finds the best factor among those in [1, 2) that are numbers of T, which keeps the values of largest magnitude exact.
// The best one minimizes the squared errors of the 16 values, relative to the largest value. For NF4 it is 1.1171875 in
// bfloat16 (8.9e-4 of the weight's norm, instead of 1.36e-3 with a factor of 1) and 1.3662109375 in float16 (8.1e-5
// instead of 1.84e-4).
template <class T>
struct PairFactors {
  float factor = 1.0f, unfactor = 1.0f;

  PairFactors() = default;
  explicit PairFactors(const CodeTable& table) {
    double least = std::numeric_limits<double>::infinity(), best = 1.0;
    for (int i = 0; i < kSteps; ++i) {
      const double multiplier = 1.0 + static_cast<double>(i) / kSteps;
      double sum = 0.0;
      for (const float value : table.value) {
        T rounded;
        const double exact = value / double{table.largest} * multiplier;
        from_float(static_cast<float>(exact), &rounded);
        const double error = (to_float(rounded) - exact) / multiplier;
        sum += error * error;
      }
      if (sum < least) least = sum, best = multiplier;
    }
    factor = static_cast<float>(best / table.largest);
    unfactor = table.largest / static_cast<float>(best);
  }

 private:
  static constexpr int kSteps = std::is_same_v<T, bfloat16> ? 128 : 1024;
};

template <class T>
PairFactors<T> pair_factors(Code code) {
  static const PerCode<PairFactors<T>> kNamed;
  if (static_cast<int>(code) < kCodeTableCount) return kNamed[code];
  static std::mutex mutex;
  static std::map<Code, PairFactors<T>> custom;
  const std::lock_guard lock(mutex);
  const auto known = custom.find(code);
  return known != custom.end() ? known->second : custom.emplace(code, PairFactors<T>(table_of(code))).first->second;
}

template <class T>
CodeView make_pair_view(Code code) {
  CodeView view = make_code_view(code);
  const PairFactors<T> factors = pair_factors<T>(code);
  view.factor = factors.factor, view.unfactor = factors.unfactor;
  return view;
}

// Fills the table at shared address `table`, a multiple of 128. Call from all kThreads threads of the CTA, and
// synchronize afterwards. With kCopies = 16, two lanes share each copy, at the cost of bank conflicts.
template <class T, int kThreads, int kCopies = kPairTableCopies>
__device__ __forceinline__ void fill_pair_table(uint32_t table, const CodeView& code) {
  code.with_values([&](const auto& value_of) {
    for (int entry = threadIdx.x; entry < 256; entry += kThreads) {
      const uint32_t pair = ptx::pack2<T>(value_of(entry >> 4) * code.factor, value_of(entry & 15) * code.factor);
      // Neighbouring threads write different 16-byte pieces of their entries at a time, which avoids bank conflicts.
      constexpr int kPieces = kCopies / 4;
      const uint32_t first = table + entry * kPairTableEntryBytes + (entry & (kPieces - 1)) * 16;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece)
        ptx::store_shared_v4(first ^ (piece * 16), make_uint4(pair, pair, pair, pair));
    }
  });
}

// Looks up the pair of byte `kByte` of `word`. `lane_offset` is 4 * (thread's lane % kCopies).
template <int kByte>
__device__ __forceinline__ uint32_t lookup_pair(uint32_t table, uint32_t lane_offset, uint32_t word) {
  constexpr uint32_t kLaneThenByte = 0x7604u | (uint32_t{kByte} << 4);
  return ptx::load_shared_u32(ptx::prmt<kLaneThenByte>(word, lane_offset) + table);
}

}  // namespace qlora::tile
