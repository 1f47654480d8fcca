// Dropout of many elements at a time. shared/dropout.h drops a single one.
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/many_tokens/multiply-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/philox.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens {

using namespace panel;

inline constexpr int kGroup = 4 * kLanes;  // consecutive elements that are decoded, or drawn, together

// The dropout mask of up to kMax consecutive elements, drawn one group of lanes at a time.
class Mask {
 public:
  static constexpr int kMax = 2 * kDepth;  // elements
  Mask(const Dropout& d, int64_t first, int64_t count) : threshold_(d.threshold) {
    if (!d.active()) return;
    first += d.first;
    skew_ = static_cast<int>(first & 3);
    for (int64_t i = 0; i < count + skew_; i += kGroup)
      philox(d.seed, (static_cast<uint64_t>(first) >> 2) + static_cast<uint64_t>(i / 4), bits_ + i);
  }
  // v, which holds elements i .. i + kLanes - 1 after `first`, with zeros for the dropped ones.
  F operator()(F v, int64_t i) const {
    if (threshold_ == 0) return v;
    if (threshold_ >> 32) return zero();
    return keep_from(v, bits_ + skew_ + i, static_cast<uint32_t>(threshold_));
  }

 private:
  uint64_t threshold_;
  int skew_ = 0;
  uint32_t bits_[kMax + 2 * kGroup];
};

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
