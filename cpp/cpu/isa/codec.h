// The vocabulary codec:: of the instruction set that is being compiled, which encodes and decodes the format.
// isa/scalar/codec.h is its definition in plain C++. Here is what follows from any set's names.
#pragma once

#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/codes.h"

#include QLORA_ISA_HEADER(codec.h)

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace codec {

// use(encoder) with the set's best encoder for the code.
template <class Use>
inline void with_encoder(Code code, const Use& use) {
  if (FastEncoder::serves(code)) {
    use(FastEncoder(code));
  } else {
    use(Encoder(code));
  }
}

// The same for stochastic rounding.
template <class Use>
inline void with_stochastic_encoder(Code code, const Use& use) {
  if (is_consecutive(code)) {
    use(ConsecutiveEncoder(table_of(code)));
  } else {
    use(StochasticEncoder(table_of(code)));
  }
}

// What the codes decode to under a scale and an offset: round(round(value * scale) + offset) in float32, then rounded
// to T.
template <class T>
inline Table<T> make_table(const Values& values, float scale, float offset) {
  return round_table<T>(add(values.times(scale), splat(offset)));
}

// The same with (value + shift) * scale, where value + shift is exact.
template <class T>
inline Table<T> make_shifted_table(const Values& values, float scale, float shift) {
  return round_table<T>(mul(add(values.times(1.0f), splat(shift)), splat(scale)));
}

}  // namespace codec
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
