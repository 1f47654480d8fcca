// The products of decoded codes and x. The forward is a template of them: IntProducts, Bf16Products and FloatProducts
// (forward_{int,bf16,float}-inl.h). An object is made once per call, for the code of its weight, and has
//
//   X, Codes, codes(chunk)            the type of arranged values of x; a chunk's decoded codes
//   multiply(codes, x, product)       product[r] = chunk of weight row r · the same chunk of a token, lane by lane
//   pair(codes), multiply_add(pair, x, scale, sums), lanes_of_row<row>(sums)
//                                     kMultipliesRowPairs only, instead of multiply: sums += scale · products of two
//                                     weight rows, and the lanes of the sums that belong to one of them
//   arrange(segment, stride, out, scale)
//                                     writes a segment in the order in which codes are decoded, its chunks `stride`
//                                     elements apart, and sets the multiplier of the sums over the segment
//   kMaxTokens, kMaxPairedTokens      for how many tokens the registers hold sums (stream.h)
//   kServesEveryRow                   whether it serves concentrated rows (concentration-inl.h)
//   kMayOverflow                      whether sums may overflow although y is finite: with scales of W above kHugeScale
//   kOffsets                          how the offsets of W's blocks enter the sums (OffsetsEnter)
//   lane_sums(chunk)                  kSums only: the sums of each lane's x in an arranged chunk
//   one_of_code()                     kSums only: the factor by which a segment's multiplier becomes that of these sums
//
// The mean square error of the products must not exceed that of rounding w to the dtype of x. If x alone shows that it
// would, arrange returns false and the token falls back to other products. If it depends on w, the weight row is summed
// in float32.
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace few_tokens {

using namespace stream;

inline constexpr float kHugeScale = 0x1p90f;

// How the offset o of a block enters the sum of its weights value * scale + o times x.
enum class OffsetsEnter {
  kNothing,  // the weight has none
  kCodes,    // codes(chunk, scale, offset) decodes to weights, and multiply sums weight * x
  kSums,     // the sums begin with each offset times the sum of x over the weights that share it (OffsetRuns)
};

// The largest lane of the maxima from max_bits.
inline uint32_t largest_lane(Ints seen) {
  uint32_t bits[kLanes], largest = 0;
  __builtin_memcpy(bits, &seen, sizeof(bits));
  for (uint32_t b : bits) largest = b > largest ? b : largest;
  return largest;
}
// The largest |x|, by its bits: a NaN counts as larger than everything. Whole vectors are read.
inline uint32_t largest_bits(const float* x, int64_t count) {
  Ints seen = round_to_ints(zero());
  for (int64_t c = 0; c < count; c += kLanes) seen = max_bits(seen, load(x + c));
  return largest_lane(seen);
}
// The same for x of any type. It reads no element beyond the last one.
template <class T>
uint32_t largest_bits_within(const T* x, int64_t count) {
  Ints seen = round_to_ints(zero());
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) seen = max_bits(seen, load(x + c, kLanes));
  if (c < count) seen = max_bits(seen, load(x + c, count - c));
  return largest_lane(seen);
}

// Whether the `count` values of x, none above `largest`, are similar enough in size for one fixed rounding step: 3/4
// are not zero, and of these 5/8 are at least largest / spread, and 7/8 at least an eighth of that. From `count` to
// padded_count, x is zero. A NaN counts as zero.
template <class T>
bool is_even(const T* x, int64_t padded_count, int64_t count, float largest, float spread) {
  int64_t large = 0, not_tiny = 0, nonzero = 0;
  for (int64_t c = 0; c < padded_count; c += kLanes) {
    const Floats values = load(x + c, padded_count - c);
    large += count_at_least(values, largest / spread);
    not_tiny += count_at_least(values, largest / (8 * spread));
    nonzero += count_at_least(values, bits_float(1));
  }
  return 8 * large >= 5 * nonzero && 8 * not_tiny >= 7 * nonzero && 4 * nonzero >= 3 * count;
}

// Whether the root mean square of the `count` values of x is at least largest / peak. From `count` to padded_count, x
// is zero.
template <class T>
bool is_below_peak(const T* x, int64_t padded_count, int64_t count, float largest, float peak) {
  const Floats inverse = splat(1.0f / largest);
  Floats squares = zero();
  for (int64_t c = 0; c < padded_count; c += kLanes) {
    const Floats relative = mul(load(x + c, padded_count - c), inverse);
    squares = fma(relative, relative, squares);
  }
  return sum(squares) * (peak * peak) >= static_cast<float>(count);
}

// Up to 1024 consecutive values of a token.
struct Segment {
  const float* x;
  int64_t chunks;
  int64_t count;           // of its values that lie in the token; the others are 0
  uint32_t token_largest;  // largest_bits of the whole token, or 0 where the segment holds all of it
};

}  // namespace few_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
