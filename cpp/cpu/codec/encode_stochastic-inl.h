// Encodes under given scales with stochastic rounding, written with the operations of codec::.
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/codec.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/with_type-inl.h"
#include "cpp/format/codes.h"

namespace qlora::cpu::QLORA_ISA {
namespace {

// What encodes groups of 32 elements.
template <class Encoder>
struct StochasticGroups {
  const Encoder& encoder;
  codec::Thresholds thresholds;
  uint8_t zero_code;

  // The group from element `first` of the tensor on, whose weights over their scales are `q`.
  void encode(const codec::Pairs& q, int64_t first, uint8_t* packed) const {
    const codec::Pairs threshold = thresholds.at(static_cast<uint64_t>(first));
    encoder.store(packed, encoder.encode(q.even, threshold.even), encoder.encode(q.odd, threshold.odd));
  }

  // Writes the codes of the first `count` elements of a group. If their number is odd, the code of 0 fills the last
  // byte.
  void keep(const uint8_t* group, int64_t count, uint8_t* packed) const {
    const int64_t whole = count / 2;
    for (int64_t i = 0; i < whole; ++i) packed[i] = group[i];
    if (count % 2) packed[whole] = static_cast<uint8_t>((group[whole] & 0xF0) | zero_code);
  }
};

// One number per block, spread over the even (or the odd) elements of a group. `of_block` points to the number of the
// group's first block. A group has two blocks of 16 elements, or belongs to one larger block.
inline codec::Floats per_element(const float* of_block, int64_t block_size) {
  return block_size < codec::kGroup ? codec::halves(of_block[0], of_block[1]) : codec::splat(of_block[0]);
}

// Calls use(first, count, block, blocks) for each group of a tensor, in parallel: its elements and its blocks.
template <class Use>
inline void for_each_group(const Pool& pool, int64_t numel, int64_t block_size, const Use& use) {
  const int shift = __builtin_ctzll(static_cast<uint64_t>(block_size));
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * codec::kGroup; first < end * codec::kGroup; first += codec::kGroup) {
      const int64_t count = min(numel - first, codec::kGroup), block = first >> shift;
      use(first, count, block, ((first + count - 1) >> shift) + 1 - block);
    }
  };
  pool(ceil_div(numel, codec::kGroup), 16384 / codec::kGroup, body);
}

template <class T, class Encoder>
void encode_stochastically_as(const Pool& pool, const StochasticGroups<Encoder>& groups, const T* w,
                              const float* absmax, int64_t numel, int64_t block_size, uint8_t* packed) {
  for_each_group(pool, numel, block_size, [&](int64_t first, int64_t count, int64_t block, int64_t blocks) {
    float inverse[2] = {};
    for (int64_t i = 0; i < blocks; ++i) inverse[i] = inverse_scale(absmax[block + i]);
    const codec::Floats factor = per_element(inverse, block_size);
    const auto encode = [&](const T* group, uint8_t* codes) {
      const codec::Pairs pairs = codec::load_pairs(group);
      groups.encode({codec::mul(pairs.even, factor), codec::mul(pairs.odd, factor)}, first, codes);
    };
    if (count == codec::kGroup) return encode(w + first, packed + first / 2);
    T filled[codec::kGroup] = {};
    uint8_t codes[codec::kGroup / 2];
    for (int64_t i = 0; i < count; ++i) filled[i] = w[first + i];
    encode(filled, codes);
    groups.keep(codes, count, packed + first / 2);
  });
}

void encode_nf4_stochastic(const Pool& pool, Code code, DType dtype, const void* w, const float* absmax, int64_t numel,
                           int64_t block_size, uint64_t seed, uint8_t* packed) {
  codec::with_stochastic_encoder(code, [&]<class Encoder>(const Encoder& encoder) {
    const StochasticGroups<Encoder> groups{encoder, codec::Thresholds(seed), table_of(code).zero_code};
    with_type(dtype, [&]<class T>() {
      encode_stochastically_as(pool, groups, static_cast<const T*>(w), absmax, numel, block_size, packed);
    });
  });
}

}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
