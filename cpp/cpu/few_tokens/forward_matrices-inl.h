// few_tokens_int by products of matrices of bytes (isa/<set>/byte_matrices.h): the sums of forward_int-inl.h, of two
// weight rows at once. Each chunk must have one scale. Refused tokens fall back to pairs of bfloat16, or to float32.
#pragma once

#include <cstdint>

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/few_tokens/forward_bf16-inl.h"
#include "cpp/cpu/few_tokens/forward_float-inl.h"
#include "cpp/cpu/few_tokens/forward_int-inl.h"
#include "cpp/cpu/isa/byte_matrices.h"
#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/code_tables.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace few_tokens {

using namespace stream;

template <class T>
struct MatrixProducts : IntProducts<T, MatrixOrder, false, kLargestOfDigits> {
  static constexpr int kMaxTokens = kMaxMatrixTokens, kMaxPairedTokens = kMaxMatrixTokens;
  static constexpr bool kMultipliesRowPairs = true;

  explicit MatrixProducts(const Weight& w)
      : IntProducts<T, MatrixOrder, false, kLargestOfDigits>(w), digits(int_codes(w.code).value) {}
  DigitCodebook digits;
  using Codes = Chunk;
  Codes codes(Chunk chunk) const { return chunk; }

  // Two rows, or one row that is multiplied twice. The lanes of sums[w] are sums of both under the scale of row w.
  template <int kRows>
  RowPair pair(const Codes (&rows)[kRows]) const {
    return decode(rows[0], rows[kRows - 1], digits);
  }
  template <int kRows>
  static void multiply_add(const RowPair& rows, const int16_t* x, const Floats (&scale)[kRows], Floats (&sums)[kRows]) {
    stream::multiply_add(rows, x, scale, sums);
  }
  template <int row>
  static Floats lanes_of_row(Floats sums) {
    return stream::lanes_of_row<row>(sums);
  }
};

inline Outcome forward_matrices(const Pool& pool, const LinearProblem& p) {
  if (p.dtype == DType::kFloat16) return forward_else_float<float16, MatrixProducts<float16>>(pool, p);
  return forward_else<bfloat16, MatrixProducts<bfloat16>>(pool, p, 0, [&](const LinearProblem& refused, int64_t first) {
    return forward_else_float<bfloat16, Bf16Products<HalfOrder>>(pool, refused, first);
  });
}

}  // namespace few_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
