// The largest absolute value of some numbers.
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"

namespace qlora::cpu::QLORA_ISA {
namespace {

// The largest lane of the maxima from stream::max_bits.
inline uint32_t largest_lane(stream::Ints seen) {
  uint32_t bits[stream::kLanes], largest = 0;
  __builtin_memcpy(bits, &seen, sizeof(bits));
  for (uint32_t b : bits) largest = b > largest ? b : largest;
  return largest;
}
// The largest |x|, by its bits: a NaN counts as larger than everything. Whole vectors are read.
inline uint32_t largest_bits(const float* x, int64_t count) {
  stream::Ints seen = stream::round_to_ints(stream::zero());
  for (int64_t c = 0; c < count; c += stream::kLanes) seen = stream::max_bits(seen, stream::load(x + c));
  return largest_lane(seen);
}
// The same for x of any type. It reads no element beyond the last one.
template <class T>
uint32_t largest_bits_within(const T* x, int64_t count) {
  stream::Ints seen = stream::round_to_ints(stream::zero());
  int64_t c = 0;
  for (; c + stream::kLanes <= count; c += stream::kLanes)
    seen = stream::max_bits(seen, stream::load(x + c, stream::kLanes));
  if (c < count) seen = stream::max_bits(seen, stream::load(x + c, count - c));
  return largest_lane(seen);
}

}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
