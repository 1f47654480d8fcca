// The vocabulary panel:: for NEON with BF16: that of NEON, and WordBf16 for BFDOT.
#pragma once

#include "cpp/cpu/isa/neon/panel.h"
#include "cpp/format/scales.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace panel {

// bfloat16 multiplication in pairs: a word of an operand is two elements. BFDOT's sums are float32, rounded to odd
// instead of to nearest, which doubles their rounding errors; and it takes subnormal factors, products and sums for
// zero.
struct WordBf16 {
  using Word = uint32_t;
  using Vector = U;
  static constexpr int kElements = 2, kWords = 1;
  using FewLanes = TwoWords<WordBf16>;  // the word for few lanes
  static Vector load(const Word* p) { return {vld1q_u32(p), vld1q_u32(p + 4)}; }
  static void store(Word* p, Vector v) {
    vst1q_u32(p, v.low);
    vst1q_u32(p + 4, v.high);
  }
  static void store_elements(Word* row, int64_t element, F v) {
    panel::store(reinterpret_cast<bfloat16*>(row) + element, v);
  }
  using Broadcast = float32x2_t;
  static Broadcast broadcast(const Word* p) { return float32x2_t{bits_float(*p)}; }
  static F multiply_add(Broadcast a, Vector b, F sum) {
    const auto add = [a](float32x4_t s, uint32x4_t x) {
      return vbfdotq_lane_f32(s, vreinterpretq_bf16_u32(x), vreinterpret_bf16_f32(a), 0);
    };
    return {add(sum.low, b.low), add(sum.high, b.high)};
  }

  // The words of up to 2 * kLanes elements, bit for bit. A word has two neighbours or, if `decoded`, elements 4i and
  // 4i + 2, or 4i + 1 and 4i + 3, as decode_row pairs them.
  template <bool decoded>
  static F load_pairs(const bfloat16* p, int64_t count) {
    bfloat16 some[2 * kLanes] = {};
    if (count < 2 * kLanes) {
      __builtin_memcpy(some, p, static_cast<size_t>(count > 0 ? count : 0) * sizeof(bfloat16));
      p = some;
    }
    const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(p);
    uint8x16_t low = vld1q_u8(bytes), high = vld1q_u8(bytes + 16);
    if constexpr (decoded) {
      static constexpr uint8_t kOrder[16] = {0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15};
      low = vqtbl1q_u8(low, vld1q_u8(kOrder)), high = vqtbl1q_u8(high, vld1q_u8(kOrder));
    }
    return {vreinterpretq_f32_u8(low), vreinterpretq_f32_u8(high)};
  }

  // Words of the elements of `first` and `second` in the same lane, both already bfloat16 values.
  static Vector pair(F first, F second) {
    const auto words = [](float32x4_t a, float32x4_t b) {
      return vsriq_n_u32(vreinterpretq_u32_f32(b), vreinterpretq_u32_f32(a), 16);
    };
    return {words(first.low, second.low), words(first.high, second.high)};
  }
  // The same, rounded here.
  static Vector round_pair(F first, F second) {
    const uint16x8_t a = round_to_bfloat16(first.low, first.high), b = round_to_bfloat16(second.low, second.high);
    return {vreinterpretq_u32_u16(vzip1q_u16(a, b)), vreinterpretq_u32_u16(vzip2q_u16(a, b))};
  }

  // The values of a code, in the form from which groups are decoded.
  using Values = SixteenFloats;
  static Values values_of(const CodeTable& table) {
    const auto load = [&](int i) { return vld1q_f32(table.value + i); };
    return {{load(0), load(4), load(8), load(12)}};
  }

  // The decoded values of the codes of a row under a block's scale, or its scale and offset.
  static WordTable row_table(const Values& values, float scale) {
    const auto scaled = [&](int i) { return vmulq_n_f32(values.q[i], scale); };
    return word_table(round_to_bfloat16(scaled(0), scaled(1)), round_to_bfloat16(scaled(2), scaled(3)));
  }
  static WordTable row_table(const Values& values, ScaleAndOffset block) {
    const auto decoded = [&](int i) {
      return vaddq_f32(vmulq_n_f32(values.q[i], block.scale), vdupq_n_f32(block.offset));
    };
    return word_table(round_to_bfloat16(decoded(0), decoded(1)), round_to_bfloat16(decoded(2), decoded(3)));
  }

  // Decodes a group of a row to words of elements (4i, 4i + 2) and (4i + 1, 4i + 3) in lane i of two vectors: the high
  // nibbles of two bytes, and the low ones.
  template <class Block>
  static void decode_row(const Values& values, const uint8_t* packed, Block block, Vector (&out)[2]) {
    const WordTable table = row_table(values, block);
    const uint8x16_t bytes = vld1q_u8(packed);
    const auto words = [&](uint8x16_t codes) -> Vector {
      const Words w = look_up(table, codes);
      return {vreinterpretq_u32_u16(w.low), vreinterpretq_u32_u16(w.high)};
    };
    out[0] = words(high_nibbles(bytes));
    out[1] = words(low_nibbles(bytes));
  }
  template <class Block>
  static void decode_row(const Values& values, const uint8_t* packed, Block block, Word* out) {
    Vector words[2];
    decode_row(values, packed, block, words);
    store(out, words[0]);
    store(out + kLanes, words[1]);
  }
  static void store_decoded_row(const F (&v)[4], Word* out) {
    store(out, round_pair(v[0], v[2]));
    store(out + kLanes, round_pair(v[1], v[3]));
  }

  // The words of a group of lanes, (row, next row). Vector j has element 4i + j in lane i.
  template <class Block>
  static void decode_lanes(const Values& values, const uint8_t* packed, const uint8_t* next, Block block,
                           Block next_block, Vector (&out)[4]) {
    const WordTable table = row_table(values, block), next_table = row_table(values, next_block);
    const Codes codes = load_codes(packed), next_codes = load_codes(next);
    const auto pairs = [](uint16x8_t a, uint16x8_t b) -> Vector {
      return {vreinterpretq_u32_u16(vzip1q_u16(a, b)), vreinterpretq_u32_u16(vzip2q_u16(a, b))};
    };
    const Words even = look_up(table, high_nibbles(codes)), next_even = look_up(next_table, high_nibbles(next_codes));
    const Words odd = look_up(table, low_nibbles(codes)), next_odd = look_up(next_table, low_nibbles(next_codes));
    out[0] = pairs(even.low, next_even.low), out[2] = pairs(even.high, next_even.high);
    out[1] = pairs(odd.low, next_odd.low), out[3] = pairs(odd.high, next_odd.high);
  }
};

}  // namespace panel
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
