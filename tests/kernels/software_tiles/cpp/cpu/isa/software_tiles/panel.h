// The vocabulary panel:: in plain C++ with as many lanes as kernels for tiles need, and the multiplication in pairs,
// whose words they use.
#pragma once

#define QLORA_PLAIN_LANES 16
#include "cpp/cpu/isa/scalar/panel.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace panel {

struct WordBf16 {
  using Word = uint32_t;
  struct Vector {
    uint32_t lane[kLanes];
  };

  static constexpr int kElements = 2, kWords = 1;
  static void store(Word* p, Vector v) { __builtin_memcpy(p, v.lane, sizeof(v)); }
  static void store_elements(Word* row, int64_t element, F v) {
    panel::store(reinterpret_cast<bfloat16*>(row) + element, v);
  }
  static Vector pair(F first, F second) { return round_pair(first, second); }
  static F as_floats(Vector words) { return __builtin_bit_cast(F, words); }
  static Vector as_words(F floats) { return __builtin_bit_cast(Vector, floats); }

  static uint32_t word(uint16_t first, uint16_t second) { return first | static_cast<uint32_t>(second) << 16; }
  static uint16_t rounded(float x) {
    bfloat16 out;
    from_float(x, &out);
    return (out.bits & 0x7F80u) == 0 ? out.bits & 0x8000u : out.bits;  // subnormals become zero
  }

  template <bool decoded>
  static F load_pairs(const bfloat16* p, int64_t count) {
    Vector out;
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t first = decoded ? i / 2 * 4 + i % 2 : 2 * i, second = first + (decoded ? 2 : 1);
      out.lane[i] = word(first < count ? p[first].bits : 0, second < count ? p[second].bits : 0);
    }
    return as_floats(out);
  }
  static Vector round_pair(F first, F second) {
    Vector out;
    for (int i = 0; i < kLanes; ++i) out.lane[i] = word(rounded(first.lane[i]), rounded(second.lane[i]));
    return out;
  }
  using Values = Table;
  static Values values_of(const CodeTable& table) { return panel::values_of(table); }
  template <class Block>
  static void decode_row(const Values& values, const uint8_t* packed, Block block, Vector (&out)[2]) {
    decode_row(values, packed, block, block, out);
  }
  template <class Block>
  static void decode_row(const Values& values, const uint8_t* packed, Block block, Block next_block, Vector (&out)[2]) {
    const Table tables[2] = {decoded_table(values, block), decoded_table(values, next_block)};
    const auto value = [&](int e) { return rounded(tables[e / (2 * kLanes)].value[code_at(packed, e)]); };
    for (int i = 0; i < kLanes; ++i) {
      out[0].lane[i] = word(value(4 * i), value(4 * i + 2));
      out[1].lane[i] = word(value(4 * i + 1), value(4 * i + 3));
    }
  }
  template <class Block>
  static Vector row_table(const Values& values, Block block, Block next_block) {
    const Table table = decoded_table(values, block), next_table = decoded_table(values, next_block);
    Vector out;
    for (int i = 0; i < kCodes; ++i) out.lane[i] = word(rounded(table.value[i]), rounded(next_table.value[i]));
    return out;
  }
  static void decode_columns(const uint8_t* packed, const uint8_t* next, Vector table, Vector (&out)[2]) {
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < 2; ++j) {
        const uint32_t first = table.lane[code_at(packed, 2 * i + j)];
        const uint32_t second = table.lane[code_at(next, 2 * i + j)];
        out[j].lane[i] = (first & 0xFFFFu) | (second & 0xFFFF0000u);
      }
    }
  }
  static void pair_rows(F row, F next, Vector (&out)[2]) {
    const Vector a = as_words(row), b = as_words(next);
    for (int i = 0; i < kLanes; ++i) {
      out[0].lane[i] = (a.lane[i] & 0xFFFFu) | b.lane[i] << 16;
      out[1].lane[i] = a.lane[i] >> 16 | (b.lane[i] & 0xFFFF0000u);
    }
  }
  static void store_pairs(bfloat16* p, Vector words, int64_t count) {
    for (int64_t e = 0; e < 2 * kLanes && e < count; ++e)
      p[e].bits = static_cast<uint16_t>(words.lane[e / 2] >> (e % 2 * 16));
  }
};

}  // namespace panel
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
