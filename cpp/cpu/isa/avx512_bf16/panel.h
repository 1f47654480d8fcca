// The vocabulary panel:: for AVX-512 with BF16: that of AVX-512, and WordBf16 for vdpbf16ps.
#pragma once

#include "cpp/cpu/isa/avx512/panel.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace panel {

// bfloat16 multiplication in pairs: a word of an operand is two elements. The sums are float32, and subnormal factors,
// products and sums count as zero.
struct WordBf16 {
  using Word = uint32_t;
  using Vector = U;
  static constexpr int kElements = 2, kWords = 1;
  using FewLanes = TwoWords<WordBf16>;  // the word for few lanes
  static Vector load(const Word* p) { return _mm512_loadu_si512(p); }
  static void store(Word* p, Vector v) { _mm512_storeu_si512(p, v); }
  static void store_elements(Word* row, int64_t element, F v) {
    panel::store(reinterpret_cast<bfloat16*>(row) + element, v);
  }
  static Vector broadcast(const Word* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
  // The same bits.
  static F as_floats(Vector words) { return _mm512_castsi512_ps(words); }
  static Vector as_words(F floats) { return _mm512_castps_si512(floats); }
  static F multiply_add(Vector a, Vector b, F sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

  // The words of up to 2 * kLanes elements, bit for bit. A word has two neighbours or, if `decoded`, elements 4i and
  // 4i + 2, or 4i + 1 and 4i + 3, as decode_row pairs them.
  template <bool decoded>
  static F load_pairs(const bfloat16* p, int64_t count) {
    const __mmask32 these = count >= 2 * kLanes ? 0xFFFFFFFFu : count > 0 ? (1u << count) - 1 : 0u;
    U pairs = _mm512_maskz_loadu_epi16(these, p);
    if constexpr (decoded) {
      const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
      pairs = _mm512_shuffle_epi8(pairs, _mm512_broadcast_i32x4(order));
    }
    return _mm512_castsi512_ps(pairs);
  }

  // Words of the elements of `first` and `second` in the same lane, both already bfloat16 values.
  static Vector pair(F first, F second) {
    return _mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_srli_epi32(_mm512_castps_si512(first), 16),
                                   _mm512_castps_si512(second));
  }
  // The same, rounded here; subnormals become zero, as the multiplication would make them anyway.
  static Vector round_pair(F first, F second) {
    const U both = (U)_mm512_cvtne2ps_pbh(second, first);  // lanes of first, then lanes of second
    const U order = _mm512_setr_epi32(0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
                                      0x180008, 0x190009, 0x1A000A, 0x1B000B, 0x1C000C, 0x1D000D, 0x1E000E, 0x1F000F);
    return _mm512_permutexvar_epi16(order, both);
  }

  // The values of a code, in the form from which groups are decoded.
  using Values = Table;
  static Values values_of(const CodeTable& table) { return panel::values_of(table); }

  // A group's `block` is its scale, or its scale and offset. Decodes a group of a row to words of elements (4i, 4i + 2)
  // and (4i + 1, 4i + 3) in lane i of two vectors.
  template <class Block>
  static void decode_row(const Values& values, const uint8_t* packed, Block block, Vector (&out)[2]) {
    const F products = decoded_table(values, block).value;
    const U table = (U)_mm512_cvtne2ps_pbh(products, products);  // twice, so that bit 4 of an index does not matter
    const U bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
    out[0] = _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table);
    out[1] = _mm512_permutexvar_epi16(bytes, table);
  }
  // The same for a group whose second half is in the next block.
  template <class Block>
  static void decode_row(const Values& values, const uint8_t* packed, Block block, Block next_block, Vector (&out)[2]) {
    const U table = row_table(values, block, next_block), of_block = _mm512_set1_epi16(0x000F);
    const U of_next = _mm512_inserti64x4(U{}, _mm256_set1_epi16(0x0010), 1);  // bit 4 of an index
    const U bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
    const auto index = [&](U codes) { return _mm512_ternarylogic_epi32(codes, of_block, of_next, 0xEA); };
    out[0] = _mm512_permutexvar_epi16(index(_mm512_srli_epi16(bytes, 4)), table);
    out[1] = _mm512_permutexvar_epi16(index(bytes), table);
  }
  template <class Block>
  static void decode_row(const Values& values, const uint8_t* packed, Block block, Word* out) {
    Vector words[2];
    decode_row(values, packed, block, words);
    store(out, words[0]);
    store(out + 16, words[1]);
  }
  static void store_decoded_row(const F (&v)[4], Word* out) {
    store(out, round_pair(v[0], v[2]));
    store(out + 16, round_pair(v[1], v[3]));
  }

  // The decoded values of the codes of a row and of the next row, and their words (row, next row). Codes lie in the low
  // four bits of each half of a lane.
  template <class Block>
  static U row_table(const Values& values, Block block, Block next_block) {
    return (U)_mm512_cvtne2ps_pbh(decoded_table(values, next_block).value, decoded_table(values, block).value);
  }
  static U row_words(U codes, U table) {  // 0xEA: (a & b) | c
    const U index =
        _mm512_ternarylogic_epi32(codes, _mm512_set1_epi32(0x000F000F), _mm512_set1_epi32(0x00100000), 0xEA);
    return _mm512_permutexvar_epi16(index, table);
  }

  // The words of a group of lanes, (row, next row). Vector j has element 4i + j in lane i.
  template <class Block>
  static void decode_lanes(const Values& values, const uint8_t* packed, const uint8_t* next, Block block,
                           Block next_block, Vector (&out)[4]) {
    const U table = row_table(values, block, next_block);
    const U codes = _mm512_or_si512(load_codes(packed), _mm512_slli_epi32(load_codes(next), 16));
    out[0] = row_words(_mm512_srli_epi16(codes, 4), table);
    out[1] = row_words(codes, table);
    out[2] = row_words(_mm512_srli_epi16(codes, 12), table);
    out[3] = row_words(_mm512_srli_epi16(codes, 8), table);
  }

  // Decodes half a group of two rows to words (row, next row) of columns 2i and 2i + 1 in lane i of two vectors.
  static void decode_columns(const uint8_t* packed, const uint8_t* next, U table, Vector (&out)[2]) {
    const auto load_bytes = [](const uint8_t* p) {
      return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    };
    const U codes = _mm512_or_si512(load_bytes(packed), _mm512_slli_epi32(load_bytes(next), 16));
    out[0] = row_words(_mm512_srli_epi32(codes, 4), table);
    out[1] = row_words(codes, table);
  }
  // The words (row, next row) of elements 2i and 2i + 1 of two rows in memory order, up to 32 elements of each.
  static void pair_rows(F row, F next, Vector (&out)[2]) {
    const U a = _mm512_castps_si512(row), b = _mm512_castps_si512(next);
    out[0] = _mm512_mask_blend_epi16(0xAAAAAAAAu, a, _mm512_slli_epi32(b, 16));
    out[1] = _mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_srli_epi32(a, 16), b);
  }
  // Stores up to 2 * kLanes elements from words of elements 2i and 2i + 1.
  static void store_pairs(bfloat16* p, Vector words, int64_t count) {
    if (count >= 2 * kLanes) {
      _mm512_storeu_si512(p, words);
    } else if (count > 0) {
      _mm512_mask_storeu_epi16(p, (1u << count) - 1, words);
    }
  }
};

}  // namespace panel
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
