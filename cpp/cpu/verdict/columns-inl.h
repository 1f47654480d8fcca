// Finds the groups of 64 columns that integer sums of dx cannot serve for few tokens: those with a concentrated column
// over the weight's rows. rows-inl.h defines "concentrated" for a row.
//
// Each column adds up its large codes, in units derived from the largest possible weight, until all columns of the
// group reach the required sum. For ordinary weights that takes the first 64 rows or so.
#pragma once

#include <cstdint>

#include "cpp/cpu/codec/scale_reader-inl.h"
#include "cpp/cpu/isa/row_pairs.h"
#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/shared/carver-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/verdict/rows-inl.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace verdict {

using namespace stream;

inline constexpr int64_t kDxColumns = 64;      // of a group
inline constexpr int64_t kDxStripGroups = 64;  // of a strip
// From one row of a strip's scales to the next. A whole vector may be read after the last scale.
inline constexpr int64_t kDxScaleStride = kDxStripGroups + kLanes;

class ColumnConcentration {
 public:
  // For `groups` groups of columns from `first` on, at most kDxStripGroups. No finite scale of W is above `largest`.
  ColumnConcentration(const Weight& w, int64_t first, int64_t groups, float largest)
      : w_(w),
        large_(large_codes(w.code)),
        reader_(w.scales, kDxColumns),
        row_groups_(w.k / kDxColumns),
        first_(first),
        groups_(groups),
        largest_(largest) {}

  void take(Carver* carver) {
    scales_ = carver->take<float>(kDxScaleStride);
    per_scale_ = carver->take<float>(kDxScaleStride);
    units_ = carver->take<uint8_t>(kRowsAtOnce * kDxScaleStride);
    sums_ = carver->take<uint8_t>(kDxStripGroups * kDxColumns);
  }

  // One bit per group, set if it has a concentrated column.
  uint64_t concentrated_groups() const {
    uint64_t left = groups_ == 64 ? ~uint64_t{0} : (uint64_t{1} << groups_) - 1;
    for (int64_t b = 0; b < kDxScaleStride; ++b) per_scale_[b] = units_per_scale(largest_);
    left = undecided_after(left, min(w_.n, kFewRows));
    return left ? by_scales_of_groups(left) : 0;
  }

 private:
  static constexpr int64_t kFewRows = 256, kRowsAtOnce = 16;
  static constexpr float kUnits = 64.0f;  // of the largest weight
  static constexpr float kMaxUnits = kMaxOfOne * kUnits;
  static constexpr int kEnough = static_cast<int>(kMinOfAll * kUnits);
  static_assert(kEnough + static_cast<int>(kMaxUnits) < 256);  // where sums saturate

  float units_per_scale(float largest) const { return kUnits * large_.least / largest; }

  // The same for the groups of `left`, in units of the largest scale of each group instead of the overall largest.
  [[gnu::noinline]] uint64_t by_scales_of_groups(uint64_t left) const {
    Ints seen[kDxStripGroups / kLanes];
    for (Ints& s : seen) s = round_to_ints(zero());
    for (int64_t n = 0; n < w_.n; ++n) {
      reader_.read(n * row_groups_ + first_, groups_, scales_);
      for (int64_t b = 0; b < groups_; b += kLanes) seen[b / kLanes] = max_bits(seen[b / kLanes], load(scales_ + b));
    }
    uint32_t bits[kDxStripGroups];
    __builtin_memcpy(bits, seen, sizeof(bits));
    for (int64_t b = 0; b < groups_; ++b) per_scale_[b] = units_per_scale(bits_float(bits[b]));
    return undecided_after(left, w_.n);
  }

  // The groups of `left` that rows 0 .. end - 1 do not prove to be without a concentrated column. Scales that are
  // infinite or NaN prove nothing.
  uint64_t undecided_after(uint64_t left, int64_t end) const {
    const int64_t row_bytes = w_.k / 2;
    const CodeSet large(large_.is_large);
    for (int64_t i = 0; i < groups_ * kDxColumns; ++i) sums_[i] = 0;
    for (int64_t n = 0; n < end && left; n += kRowsAtOnce) {
      const int64_t rows = min(end - n, kRowsAtOnce);
      for (int64_t t = 0; t < rows; ++t) {
        reader_.read((n + t) * row_groups_ + first_, groups_, scales_);
        for (int64_t b = 0; b < groups_; b += kLanes)
          store_units(units_ + t * kDxScaleStride + b, mul(absolute(load(scales_ + b)), load(per_scale_ + b)),
                      kMaxUnits);
      }
      const uint8_t* const packed = w_.packed + n * row_bytes + first_ * (kDxColumns / 2);
      for (uint64_t to_do = left; to_do; to_do &= to_do - 1) {
        const int b = __builtin_ctzll(to_do);
        uint8_t* const sums = sums_ + b * kDxColumns;
        Ints sum;
        __builtin_memcpy(&sum, sums, sizeof(sum));
        for (int64_t t = 0; t < rows; ++t)
          sum = add_where_in(large, sum, packed + t * row_bytes + b * (kDxColumns / 2), units_[t * kDxScaleStride + b]);
        __builtin_memcpy(sums, &sum, sizeof(sum));
        if (all_bytes_at_least(sum, kEnough)) left &= ~(uint64_t{1} << b);
      }
    }
    return left;
  }

  const Weight& w_;
  const LargeCodes& large_;
  const ScaleReader reader_;
  const int64_t row_groups_, first_, groups_;
  const float largest_;
  float *scales_ = nullptr, *per_scale_ = nullptr;
  uint8_t* units_ = nullptr;  // [row of a tile][group]: the least weight of a large code
  uint8_t* sums_ = nullptr;   // [group][column, in the order of add_where_in]
};

}  // namespace verdict
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
