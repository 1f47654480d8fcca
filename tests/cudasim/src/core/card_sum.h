// Sums as tensor cores make them (CUDASIM_MMA=card).
//
// A tensor core does not add one product after the other. It takes several products and the accumulator, aligns all of
// them to the largest exponent among them, cuts each to a fixed number of bits, adds those exactly, and cuts the sum to
// float32. The figures are those of MMA-Sim (arXiv 2511.10909), which was compared with cards.
#pragma once
#include "ast.h"

namespace cudasim {

struct CardSum {
  int terms;         // products that one addition takes, besides the accumulator
  int fraction;      // bits of each term below the largest exponent
  int kept;          // bits of a float32 result's fraction
  int min_a, min_b;  // the least exponents of the operands' types
  bool half;         // the accumulator and the result are float16, and the result is rounded to nearest
};
// For an instruction with K products per element of the result. `arch`: 90 for sm_90.
CardSum card_sum(int arch, bool wgmma, Ty a, Ty b, Ty result, int K);

// acc[r][8] += A[r][K] * B[K][8] for each of the rows.
void add_as_card(const CardSum& card, int rows, int K, const float* A, const float* B, float* acc);

// The same in float32, rounding each sum to nearest, in order of k.
void add_in_order(int rows, int K, const float* A, const float* B, float* acc);

}  // namespace cudasim
