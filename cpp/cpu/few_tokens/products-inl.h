// How a chunk of decoded codes meets x. Three ways share the forward: IntProducts, Bf16Products and
// FloatProducts (forward_{int,bf16,float}-inl.h). Each has
//
//   X, Codes, codes(chunk)            what x is arranged as; a chunk's codes, decoded
//   multiply(codes, x, product)       product[r] = chunk of weight row r · the same chunk of a token, lane by lane
//   arrange(x, chunks, stride, out, scale)
//                                     takes a *segment* of x, up to 1024 values in memory order, to the order in which
//                                     codes are decoded, a chunk every `stride` elements, and sets what the sums over
//                                     the segment are to be multiplied by
//   kMaxTokens, kMaxPairedTokens      how many tokens its sums leave registers for (stream.h)
//
// Whatever x is, its products with w must be no further off, in the mean square, than a rounding of w to the dtype of x
// makes them. Where arrange cannot promise that it returns false, and the token is left to other Products.
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace few_tokens {

using namespace stream;

// The largest |x| of a segment, by its bits: a NaN counts as larger than everything.
inline uint32_t largest_bits(const float* x, int64_t count) {
  Ints seen = round_to_ints(zero());
  for (int64_t c = 0; c < count; c += kLanes) seen = max_bits(seen, load(x + c));
  uint32_t bits[kLanes], largest = 0;
  __builtin_memcpy(bits, &seen, sizeof(bits));
  for (uint32_t b : bits) largest = b > largest ? b : largest;
  return largest;
}

}  // namespace few_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
