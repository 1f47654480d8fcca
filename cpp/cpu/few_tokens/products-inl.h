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
//   kServesEveryRow                   whether it serves concentrated rows (verdict/rows-inl.h)
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
#include "cpp/cpu/verdict/tokens-inl.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace few_tokens {

using namespace stream;
using namespace verdict;

// How the offset o of a block enters the sum of its weights value * scale + o times x.
enum class OffsetsEnter {
  kNothing,  // the weight has none
  kCodes,    // codes(chunk, scale, offset) decodes to weights, and multiply sums weight * x
  kSums,     // the sums begin with each offset times the sum of x over the weights that share it (OffsetRuns)
};

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
