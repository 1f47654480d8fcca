// Float32 multiplication: a word of an operand is one element.
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/format/codes.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens {

using namespace panel;

struct WordF32 {
  using Word = float;
  using Vector = F;
  static constexpr int kElements = 1, kWords = 1;
  using FewLanes = TwoWords<WordF32>;  // the word for few lanes
  static Vector load(const Word* p) { return panel::load(p); }
  static void store(Word* p, Vector v) { panel::store(p, v); }
  static void store_elements(Word* row, int64_t element, F v) { store(row + element, v); }

  // The values of a code, in the form from which groups are decoded.
  using Values = Table;
  static Values values_of(const CodeTable& table) { return panel::values_of(table); }

  // A group of one block, whose scale or scale and offset is `block`, decoded: vector j lane i is element 4i + j, in
  // this order in memory.
  template <class Block>
  static void decode_row(const Values& values, const uint8_t* packed, Block block, Word* out) {
    F v[4];
    decode_lanes(values, packed, nullptr, block, {}, v);
    store_decoded_row(v, out);
  }
  static void store_decoded_row(const F (&v)[4], Word* out) {
    unroll<4>([&](auto j) { store(out + j.value * kLanes, v[j.value]); });
  }
  // The words of a group of lanes. A word has an element of one weight row, so the arguments of the next row are
  // unused.
  template <class Block>
  static void decode_lanes(const Values& values, const uint8_t* packed, const uint8_t*, Block block, Block,
                           Vector (&out)[4]) {
    const auto table = decoded_table(values, block);
    const Codes codes = load_codes(packed);
    unroll<4>([&](auto j) { out[j.value] = lookup<j.value>(table, codes); });
  }
  static Broadcast broadcast(const Word* p) { return panel::broadcast(p); }
  static F multiply_add(Broadcast a, Vector b, F sum) { return panel::multiply_add(a, b, sum); }
};

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
