// What the integer sums of dx look up before they start: which groups of columns are concentrated, and how large dy may
// be for a token to be served.
#pragma once

#include <cstdint>

#include "cpp/cpu/few_tokens/budget-inl.h"
#include "cpp/cpu/few_tokens/products-inl.h"
#include "cpp/cpu/few_tokens/weight-inl.h"
#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/shared/carver-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/scratch.h"
#include "cpp/cpu/verdict/columns-inl.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace few_tokens {

using namespace stream;
using namespace verdict;

struct DxScan {
  uint8_t* concentrated;  // of each group of columns: 1 if it has a concentrated column
  float* most_dy;         // of each token: the largest |dy| that a tile may have to be served
};

// 2^kMaxLog2Spread is kSpread.
template <class T>
inline constexpr float kMaxLog2Spread = kMantissaBits<T> == 7 ? 7.0f : 4.0f;

// most_dy from a histogram of the exponents of dy and the two bits after them: at most a fifth below the exact value.
template <class T>
[[gnu::noinline]] float most_dy_by_histogram(const T* dy, int64_t rows) {
  constexpr int kDropped = 21, kBins = 1 << (31 - kDropped);
  uint32_t count[kBins] = {};
  for (int64_t n = 0; n < rows; ++n) ++count[(float_bits(to_float(dy[n])) & kMagnitudeBits) >> kDropped];
  int64_t zeros = 0;
  for (int64_t n = 0; n < rows; ++n) zeros += to_float(dy[n]) == 0.0f;
  const int64_t nonzero = rows - zeros;
  if (4 * nonzero < 3 * rows) return 0.0f;
  // The bound that `eighths` eighths of the nonzero values reach.
  const auto least_of = [&](int64_t eighths) {
    int bin = kBins - 1;
    for (int64_t seen = count[bin]; 8 * seen < eighths * nonzero && bin > 0; seen += count[bin]) --bin;
    return bits_float(static_cast<uint32_t>(bin) << kDropped);
  };
  const float of_large = least_of(5), of_most = 8 * least_of(7);
  return kSpread<T> * (of_large < of_most ? of_large : of_most);
}

// The largest value that, as the largest of a token's dy, still lets is_even hold for it.
template <class T>
float most_dy(const T* dy, int64_t rows) {
  const uint32_t largest = largest_bits_within(dy, rows);
  if (largest < kInfinityBits && is_even<T>(kFewTokensRule, dy, rows, rows, bits_float(largest)))
    return bits_float(largest);
  return most_dy_by_histogram(dy, rows);
}

// The arrays are valid until the next request for ScratchUse::kBefore.
template <class T>
DxScan scan_dx(const Pool& pool, const LinearDxProblem& p) {
  constexpr int64_t kGroups = 16;  // per task
  const int64_t row_groups = p.w.k / kDxColumns;
  DxScan scan;
  const auto lay_out = [&](void* base) {
    Carver memory(base);
    scan.concentrated = memory.take<uint8_t>(row_groups);
    scan.most_dy = memory.take<float>(p.m);
    return memory.used();
  };
  lay_out(scratch(ScratchUse::kBefore, lay_out(nullptr)));
  const float largest = ScaleReader(p.w.scales, kDxColumns).largest(0, p.w.n * row_groups);
  auto scan_groups = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kGroups, groups = min(row_groups - first, kGroups);
      ColumnConcentration columns(p.w, first, groups, largest);
      const auto carve = [&](void* base) {
        Carver memory(base);
        columns.take(&memory);
        return memory.used();
      };
      carve(scratch(ScratchUse::kThread, carve(nullptr)));
      const uint64_t concentrated = columns.concentrated_groups();
      for (int64_t b = 0; b < groups; ++b) scan.concentrated[first + b] = concentrated >> b & 1;
    }
  };
  run(pool, p.w.n * p.w.k > 8 * kWorthThreads, ceil_div(row_groups, kGroups), 1, scan_groups);
  for (int64_t i = 0; i < p.m; ++i) scan.most_dy[i] = most_dy(static_cast<const T*>(p.dy) + i * p.w.n, p.w.n);
  return scan;
}

}  // namespace few_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
