// Finds the groups of columns that panels of integers cannot serve for dx: those with a concentrated column
// (rows-inl.h), or with scales that differ too much from row to row.
#pragma once

#include <cstdint>

#include "cpp/cpu/codec/scale_reader-inl.h"
#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/shared/carver-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/scratch.h"
#include "cpp/cpu/tuning.h"
#include "cpp/cpu/verdict/rows-inl.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace verdict {

using namespace stream;

// The columns of a weight that panels of integers can serve. Columns with common scales form *groups* of 32 or 64, and
// rows whose products are summed in integers *chains*.
template <int64_t kRowsOfChain>
class PanelColumns {
 public:
  static constexpr int64_t kChainRows = kRowsOfChain;

  explicit PanelColumns(const Weight& w)
      : w_(w),
        reader_(w.scales, kIntColumns),
        chains_(w.n / kChainRows),
        groups_(w.k / reader_.granule()),
        units_(w.k / kIntColumns) {}

  void take(Carver* memory) {
    largest_ = memory->take<float>(chains_ * groups_);
    squares_ = memory->take<float>(chains_ * groups_);
    bounds_ = memory->take<float>(chains_ * groups_);
    in_float_ = memory->take<uint8_t>(units_);
  }
  // Returns the number of units that integers cannot serve.
  int64_t find(const Pool& pool) {
    auto scan_chains = [&](int64_t begin, int64_t end) {
      for (int64_t chain = begin; chain < end; ++chain) scan_chain(chain);
    };
    pool(chains_, 1, scan_chains);
    auto scan_units = [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) in_float_[unit] = !serves_unit(unit);
    };
    pool(units_, 4, scan_units);
    int64_t count = 0;
    for (int64_t unit = 0; unit < units_; ++unit) count += in_float_[unit];
    return count;
  }

  // Units of kIntColumns columns are served or not.
  int64_t units() const { return units_; }
  bool in_float(int64_t unit) const { return in_float_[unit]; }
  int64_t group_columns() const { return reader_.granule(); }
  // The largest scale of a group in a chain of rows.
  float largest(int64_t chain, int64_t group) const { return largest_[chain * groups_ + group]; }

 private:
  static constexpr float kLeastScale = 0x1p-100f;

  void scan_chain(int64_t chain) {
    const int64_t stride = groups_ + kLanes + 2, offsets = kChainRows * stride;
    const int64_t bytes = (w_.scales.offsets ? 2 : 1) * offsets * static_cast<int64_t>(sizeof(float));
    float* const scales = static_cast<float*>(scratch(ScratchUse::kThread, bytes));
    for (int64_t r = 0; r < kChainRows; ++r) {
      float* const of_row = scales + r * stride;
      reader_.read((chain * kChainRows + r) * groups_, groups_, of_row);
      if (w_.scales.offsets)
        reader_.read_offsets((chain * kChainRows + r) * groups_, groups_, of_row, of_row + offsets);
    }
    const float least = w_.table().ranked[0], most = w_.table().ranked[w_.table().ranks - 1];
    for (int64_t g = 0; g < groups_; ++g) {
      uint32_t largest_bits = 0, bound_bits = 0;  // as an integer, a NaN is above all numbers
      for (int64_t r = 0; r < kChainRows; ++r) {
        const float* const scale = scales + r * stride + g;
        const float offset = w_.scales.offsets ? scale[offsets] : 0.0f;
        raise(&largest_bits, size_bits(*scale));
        raise(&bound_bits, size_bits(*scale * least + offset)), raise(&bound_bits, size_bits(*scale * most + offset));
      }
      const float largest = bits_float(largest_bits), inverse = largest > 0.0f ? 1.0f / largest : 0.0f;
      float squares = 0.0f;
      int64_t similar = 0;
      for (int64_t r = 0; r < kChainRows; ++r) {
        const float relative = __builtin_fabsf(scales[r * stride + g]) * inverse;
        similar += relative >= kLeastRelative, squares += relative * relative;
      }
      const bool in_range = largest == 0.0f || (largest >= kLeastScale && largest <= kHugeScale);
      const bool serves = in_range && bound_bits < kInfinityBits && (8 * similar >= 5 * kChainRows || largest == 0.0f);
      const int64_t at = chain * groups_ + g;
      largest_[at] = largest, squares_[at] = squares, bounds_[at] = serves ? bits_float(bound_bits) : kNotServed;
    }
  }
  static uint32_t size_bits(float x) { return float_bits(x) & 0x7FFFFFFFu; }
  template <class Number>
  static void raise(Number* largest, Number x) {
    if (x > *largest) *largest = x;
  }

  bool serves_unit(int64_t unit) const {
    const int64_t of_unit = kIntColumns / group_columns();
    float bound = 0.0f;
    for (int64_t g = unit * of_unit; g < (unit + 1) * of_unit; ++g) {
      float largest = 0.0f, of_weights = 0.0f, of_steps = 0.0f;
      for (int64_t chain = 0; chain < chains_; ++chain) {
        const float of_chain = bounds_[chain * groups_ + g];
        if (of_chain == kNotServed) return false;
        raise(&bound, of_chain), raise(&largest, this->largest(chain, g));
      }
      if (largest == 0.0f) continue;
      for (int64_t chain = 0; chain < chains_; ++chain) {
        const float relative = this->largest(chain, g) / largest, square = relative * relative;
        of_weights += square * squares_[chain * groups_ + g], of_steps += square * kChainRows;
      }
      if (of_weights < kLeastSquares * of_steps) return false;
    }
    return bound == 0.0f || has_many_weights(unit, bound);
  }

  // Whether no column of the unit is concentrated, as far as the largest possible
  // weight of the unit, `bound`, proves it.
  bool has_many_weights(int64_t unit, float bound) const {
    const Floats most = splat(bound * kMaxOfOne);
    Floats sums[kIntColumns / kLanes];
    for (Floats& sum : sums) sum = zero();
    const int64_t of_unit = kIntColumns / group_columns();
    for (int64_t row = 0; row < w_.n; ++row) {
      float scale[2 + kLanes], offset[2 + kLanes];
      const int64_t granule = row * groups_ + unit * of_unit;
      reader_.read(granule, of_unit, scale);
      if (w_.scales.offsets) reader_.read_offsets(granule, of_unit, scale, offset);
      const GranuleScales scales{scale, w_.scales.offsets ? offset : nullptr, granule, of_unit, 0.0f};
      WeightPieces pieces(w_, reader_, scales);
      const int64_t first = row * w_.k + unit * kIntColumns;
      const float* const weights = pieces.decode(first, first + kIntColumns);
      for (int64_t i = 0; i < kIntColumns / kLanes; ++i) {
        const Floats size = absolute(load(weights + i * kLanes));
        sums[i] = add(sums[i], min(size, most));
      }
      if (row % 16 == 15 && suffice(sums, bound)) return true;
    }
    return false;
  }
  static bool suffice(const Floats (&sums)[kIntColumns / kLanes], float bound) {
    for (const Floats sum : sums)
      if (count_at_least(sum, kManyTokensRule.least_sum * bound) < kLanes) return false;
    return true;
  }

  // Of the rows of a chain 5/8 must have at least this part of the largest scale, and in the mean square of all chains
  // scales must be at least a quarter of the largest: what is below the largest, dy · scale is rounded more coarsely.
  static constexpr float kLeastRelative = 0.0625f, kLeastSquares = 0.0625f;
  static constexpr float kNotServed = -1.0f;

  const Weight& w_;
  const ScaleReader reader_;
  const int64_t chains_, groups_, units_;
  float *largest_ = nullptr, *squares_ = nullptr;  // [chain][group]; the squares in units of the largest
  float* bounds_ = nullptr;                        // [chain][group]: the largest possible weight, or kNotServed
  uint8_t* in_float_ = nullptr;
};

}  // namespace verdict
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
