// Finds scales that suit a weight's inputs: the search of search_absmax_nf4 (kernels.h), written with the operations of
// codec::.
//
// For each block, the search minimizes the weighted error over the scale s:
//
//     sum over j of importance[j] * (w[j] - s * value[code(w[j] / s)])^2
//
// The first candidates are the scale that the block has without a search, and its products with kSearchSteps factors.
// Two more candidates follow. Each is the optimal s for the codes of the best scale so far, sum(importance * w * value)
// / sum(importance * value^2). All sums run over 16 lanes, so every instruction set finds the same bits.
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/codec.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/with_type-inl.h"
#include "cpp/format/codes.h"
#include "cpp/format/search_absmax.h"

namespace qlora::cpu::QLORA_ISA {
namespace {

inline constexpr int64_t kSearchGrainElements = 4096;

// A block as float32, padded to whole groups with zeros that have no importance.
struct WeightedBlock {
  alignas(64) float w[kMaxBlockSize];
  alignas(64) float importance[kMaxBlockSize];
  int64_t count;
};

// Returns the sum of the lanes, with halves added to halves.
inline float sum_of_lanes(codec::Floats lanes) {
  float sum[codec::kLanes];
  codec::store(sum, lanes);
  for (int half = codec::kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
  return sum[0];
}

template <class Encoder>
inline float weighted_error(const Encoder& encoder, const WeightedBlock& block, float scale) {
  const codec::Floats inverse = codec::splat(inverse_scale(scale));
  codec::Floats sum = codec::splat(0.0f);
  for (int64_t i = 0; i < block.count; i += codec::kLanes) {
    const codec::Floats q = codec::mul(codec::load(block.w + i), inverse);
    const codec::Floats error = codec::sub(q, encoder.values(encoder.encode(q)));
    sum = codec::add(sum, codec::mul(codec::mul(error, error), codec::load(block.importance + i)));
  }
  return sum_of_lanes(sum) * scale * scale;
}

// Returns the best scale for the codes that `scale` gives, or 0 if all codes with nonzero importance have the value
// zero.
template <class Encoder>
inline float fitted_scale(const Encoder& encoder, const WeightedBlock& block, float scale) {
  const codec::Floats inverse = codec::splat(inverse_scale(scale));
  codec::Floats products = codec::splat(0.0f), squares = codec::splat(0.0f);
  for (int64_t i = 0; i < block.count; i += codec::kLanes) {
    const codec::Floats w = codec::load(block.w + i);
    const codec::Floats value = encoder.values(encoder.encode(codec::mul(w, inverse)));
    const codec::Floats weighted = codec::mul(value, codec::load(block.importance + i));
    products = codec::add(products, codec::mul(weighted, w));
    squares = codec::add(squares, codec::mul(weighted, value));
  }
  const float square = sum_of_lanes(squares);
  return square > 0.0f ? sum_of_lanes(products) / square : 0.0f;
}

// `absmax` is the scale that the block has without a search.
template <class Encoder>
inline float best_scale(const Encoder& encoder, const WeightedBlock& block, float absmax) {
  float best = absmax, least = weighted_error(encoder, block, absmax);
  const auto consider = [&](float scale) {
    const float error = weighted_error(encoder, block, scale);
    if (!(error < least)) return;
    best = scale;
    least = error;
  };
  for (int step = 0; step < kSearchSteps; ++step) consider(absmax * search_factor(step));
  for (int fit = 0; fit < kSearchFits; ++fit) {
    const float scale = fitted_scale(encoder, block, best);
    if (scale > 0.0f) consider(scale);
  }
  return best;
}

// Loads the block that begins at element `first`, in rows of k. Returns its absmax, or NaN if it has a NaN or an
// infinity.
template <class T>
inline float load_block(const T* w, const float* importance, int64_t first, int64_t count, int64_t k,
                        WeightedBlock* block) {
  uint32_t largest = 0;
  int64_t column = first % k;
  for (int64_t i = 0; i < count; ++i) {
    block->w[i] = to_float(w[first + i]);
    block->importance[i] = importance[column];
    const uint32_t magnitude = float_bits(block->w[i]) & kMagnitudeBits;
    largest = magnitude > largest ? magnitude : largest;
    column = column + 1 == k ? 0 : column + 1;
  }
  block->count = round_up(count, codec::kLanes);
  for (int64_t i = count; i < block->count; ++i) block->w[i] = block->importance[i] = 0.0f;
  return largest < kInfinityBits ? bits_float(largest) : bits_float(0x7FC00000u);
}

template <class T, class Encoder>
void search_absmax_as(const Pool& pool, const Encoder& encoder, float largest_value, const T* w,
                      const float* importance, int64_t numel, int64_t k, int64_t block_size, float* absmax) {
  auto body = [=](int64_t begin, int64_t end) {
    WeightedBlock block;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * block_size;
      const float largest = load_block(w, importance, first, min(block_size, numel - first), k, &block);
      absmax[b] = largest > 0.0f ? best_scale(encoder, block, scale_of(largest, largest_value)) : largest;
    }
  };
  pool(ceil_div(numel, block_size), ceil_div(kSearchGrainElements, block_size), body);
}

void search_absmax_nf4(const Pool& pool, Code code, DType dtype, const void* w, const float* importance, int64_t numel,
                       int64_t k, int64_t block_size, float* absmax) {
  const CodeTable& table = table_of(code);
  codec::with_encoder(code, [&](const auto& encoder) {
    with_type(dtype, [&]<class T>() {
      search_absmax_as(pool, encoder, table.largest, static_cast<const T*>(w), importance, numel, k, block_size,
                       absmax);
    });
  });
}

}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
