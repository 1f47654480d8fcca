// Encodes under given scales, without and with feedback of the rounding errors, written with the operations of codec::.
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/codec.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/scratch.h"
#include "cpp/cpu/shared/with_type-inl.h"
#include "cpp/format/codes.h"

namespace qlora::cpu::QLORA_ISA {
namespace {

template <class Encoder, class T>
inline void encode_group(const Encoder& encoder, const T* group, float inverse, uint8_t* packed) {
  const codec::Pairs pairs = codec::load_pairs(group);
  const codec::Floats scale = codec::splat(inverse);
  codec::store_packed(packed, encoder.encode(codec::mul(pairs.even, scale)),
                      encoder.encode(codec::mul(pairs.odd, scale)));
}

// Encodes whole groups straight from w. The rest goes through a buffer, and an odd number of codes is padded with the
// code of 0.
template <class Encoder, class T>
inline void encode_block_under(const Encoder& encoder, const T* w, int64_t count, float scale, uint8_t zero_code,
                               uint8_t* packed) {
  const float inverse = inverse_scale(scale);
  const int64_t whole = count / codec::kGroup * codec::kGroup, rest = count - whole;
  for (int64_t i = 0; i < whole; i += codec::kGroup) encode_group(encoder, w + i, inverse, packed + i / 2);
  if (rest == 0) return;
  T filled[codec::kGroup] = {};
  uint8_t bytes[codec::kGroup / 2];
  for (int64_t i = 0; i < rest; ++i) filled[i] = w[whole + i];
  encode_group(encoder, filled, inverse, bytes);
  if (rest % 2) bytes[rest / 2] = static_cast<uint8_t>((bytes[rest / 2] & 0xF0) | zero_code);
  for (int64_t i = 0; i < packed_bytes(rest); ++i) packed[whole / 2 + i] = bytes[i];
}

template <class T, class Encoder>
void encode_as(const Pool& pool, const Encoder& encoder, const T* w, const float* absmax, int64_t numel,
               int64_t block_size, uint8_t zero_code, uint8_t* packed) {
  auto body = [=](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * block_size;
      encode_block_under(encoder, w + first, min(block_size, numel - first), absmax[b], zero_code, packed + first / 2);
    }
  };
  pool(ceil_div(numel, block_size), ceil_div(int64_t{16384}, block_size), body);
}

void encode_nf4(const Pool& pool, Code code, DType dtype, const void* w, const float* absmax, int64_t numel,
                int64_t block_size, uint8_t* packed) {
  codec::with_encoder(code, [&](const auto& encoder) {
    with_type(dtype, [&]<class T>() {
      encode_as(pool, encoder, static_cast<const T*>(w), absmax, numel, block_size, table_of(code).zero_code, packed);
    });
  });
}

// Rows are independent. 16 rows form a stripe, in the 16 lanes of a vector, and one thread processes a stripe from its
// first place to its last. A place is a column's position in the order of rounding.
//
//     place        0 .......... batch .......... k
//     weights  [k][16]   rounded | being | to be        float32, less the errors of all earlier places
//     errors   [kBatch][16]      | these |              the rounding error of a place, over feedback's diagonal
//
// Within a batch, each place's error is applied at once to the later places of the batch. The places after the batch
// receive all of the batch's errors together, summed in registers.
inline constexpr int64_t kStripeRows = codec::kLanes;
inline constexpr int64_t kFeedbackBatch = 32;
inline constexpr int64_t kPlacesAtOnce = 8;

struct Stripe {
  float* weights;  // [k][16]
  float* errors;   // [kFeedbackBatch][16]
  uint8_t* codes;  // [k][16], by column
};

// Rounds the places [first, last), and applies each place's error to the later ones among them.
template <class Encoder>
inline void round_batch(const Encoder& encoder, const Stripe& stripe, int64_t row, int64_t rows, const float* absmax,
                        int64_t k, int shift, int64_t first, int64_t last, const float* feedback,
                        const int64_t* order) {
  for (int64_t place = first; place < last; ++place) {
    const int64_t column = order[place];
    float scale[kStripeRows], inverse[kStripeRows];
    for (int64_t r = 0; r < kStripeRows; ++r) scale[r] = r < rows ? absmax[((row + r) * k + column) >> shift] : 1.0f;
    for (int64_t r = 0; r < kStripeRows; ++r) inverse[r] = inverse_scale(scale[r]);
    const codec::Floats w = codec::load(stripe.weights + place * kStripeRows);
    const codec::Codes codes = encoder.encode(codec::mul(w, codec::load(inverse)));
    codec::store_codes(stripe.codes + column * kStripeRows, codes);
    const codec::Floats rounded = codec::mul(encoder.values(codes), codec::load(scale));
    const float* const factors = feedback + place * k;
    const codec::Floats error = codec::mul(codec::sub(w, rounded), codec::splat(1.0f / factors[place]));
    codec::store(stripe.errors + (place - first) * kStripeRows, error);
    for (int64_t later = place + 1; later < last; ++later) {
      float* const weights = stripe.weights + later * kStripeRows;
      codec::store(weights, codec::sub(codec::load(weights), codec::mul(error, codec::splat(factors[later]))));
    }
  }
}

// weights[later ..) -= errors · factors, for the errors of the places [first, last).
template <int64_t kPlaces>
inline void feed_back(const Stripe& stripe, int64_t k, int64_t first, int64_t last, int64_t later,
                      const float* feedback) {
  float* const weights = stripe.weights + later * kStripeRows;
  codec::Floats sum[kPlaces];
  for (int64_t i = 0; i < kPlaces; ++i) sum[i] = codec::load(weights + i * kStripeRows);
  for (int64_t place = first; place < last; ++place) {
    const codec::Floats error = codec::load(stripe.errors + (place - first) * kStripeRows);
    const float* const factors = feedback + place * k + later;
    for (int64_t i = 0; i < kPlaces; ++i) sum[i] = codec::sub(sum[i], codec::mul(error, codec::splat(factors[i])));
  }
  for (int64_t i = 0; i < kPlaces; ++i) codec::store(weights + i * kStripeRows, sum[i]);
}

// Packs the codes of `rows` rows from element `row` * k on, which is even. `pad` fills the last byte if the number of
// codes is odd.
inline void pack_stripe(const Stripe& stripe, int64_t row, int64_t rows, int64_t k, uint8_t pad, uint8_t* packed) {
  uint8_t* out = packed + row * k / 2;
  uint8_t high = 0;
  int64_t element = 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t column = 0; column < k; ++column, ++element) {
      const uint8_t code = stripe.codes[column * kStripeRows + r];
      if (element % 2 == 0) {
        high = static_cast<uint8_t>(code << 4);
      } else {
        *out++ = high | code;
      }
    }
  }
  if (element % 2) *out = high | pad;
}

template <class T, class Encoder>
void encode_with_feedback_as(const Pool& pool, const Encoder& encoder, const T* w, const float* absmax, int64_t n,
                             int64_t k, int64_t block_size, const float* feedback, const int64_t* order, uint8_t pad,
                             uint8_t* packed) {
  const int shift = __builtin_ctzll(static_cast<uint64_t>(block_size));
  auto body = [=](int64_t begin, int64_t end) {
    const int64_t floats = (k + kFeedbackBatch) * kStripeRows;
    auto* const memory = static_cast<float*>(
        scratch(ScratchUse::kThread, floats * static_cast<int64_t>(sizeof(float)) + k * kStripeRows));
    const Stripe stripe = {memory, memory + k * kStripeRows, reinterpret_cast<uint8_t*>(memory + floats)};
    for (int64_t s = begin; s < end; ++s) {
      const int64_t rows = min(kStripeRows, n - s * kStripeRows);
      for (int64_t place = 0; place < k; ++place) {
        const T* const column = w + s * kStripeRows * k + order[place];
        float* const weights = stripe.weights + place * kStripeRows;
        for (int64_t r = 0; r < kStripeRows; ++r) weights[r] = r < rows ? to_float(column[r * k]) : 0.0f;
      }
      for (int64_t first = 0; first < k; first += kFeedbackBatch) {
        const int64_t last = min(first + kFeedbackBatch, k);
        round_batch(encoder, stripe, s * kStripeRows, rows, absmax, k, shift, first, last, feedback, order);
        int64_t later = last;
        for (; later + kPlacesAtOnce <= k; later += kPlacesAtOnce) {
          feed_back<kPlacesAtOnce>(stripe, k, first, last, later, feedback);
        }
        for (; later < k; ++later) feed_back<1>(stripe, k, first, last, later, feedback);
      }
      pack_stripe(stripe, s * kStripeRows, rows, k, pad, packed);
    }
  };
  pool(ceil_div(n, kStripeRows), 1, body);
}

void encode_nf4_with_feedback(const Pool& pool, Code code, DType dtype, const void* w, const float* absmax, int64_t n,
                              int64_t k, int64_t block_size, const float* feedback, const int64_t* order,
                              uint8_t* packed) {
  const CodeTable& table = table_of(code);
  codec::with_encoder(code, [&](const auto& encoder) {
    with_type(dtype, [&]<class T>() {
      encode_with_feedback_as(pool, encoder, static_cast<const T*>(w), absmax, n, k, block_size, feedback, order,
                              table.zero_code, packed);
    });
  });
}

}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
