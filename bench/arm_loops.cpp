// The inner loops of the ARM kernels, each in a function of its own, for bench/arm_static.py to count. Compiled with
// -DQLORA_ISA=neon or neon_bf16 and the flags of that set.
#include "cpp/cpu/codec/dequantize-inl.h"
#include "cpp/cpu/few_tokens/forward_float-inl.h"
#include "cpp/cpu/few_tokens/forward_int-inl.h"
#include "cpp/cpu/many_tokens/multiply-inl.h"
#include "cpp/cpu/many_tokens/weight-inl.h"
#include "cpp/cpu/many_tokens/word_f32-inl.h"
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
#include "cpp/cpu/few_tokens/forward_bf16-inl.h"
#endif

using namespace qlora;
using namespace qlora::cpu::QLORA_ISA;

namespace {

template <class W>
void decode_rows(const uint8_t* packed, const float* scales, int64_t groups, typename W::Word* panel) {
  for (int64_t i = 0; i < groups; ++i) {
    W::decode_row(packed, scales[i], panel);
    packed += many_tokens::kGroup / 2, panel += many_tokens::kGroup / W::kElements;
  }
}

struct NothingElse {
  void step() {}
};
template <class W>
void multiply(const typename W::Word* broadcast, const typename W::Word* lanes, int depth, float* sums) {
  NothingElse nothing;
  many_tokens::multiply_tile<W, many_tokens::kDepth, panel::kAccumulators / 2, 2>(broadcast, lanes, depth, sums, true,
                                                                                  nothing);
}

}  // namespace

#define FEW_TOKENS(name, Products, tokens)                                                                         \
  void name##_##tokens(const few_tokens::Stretch& stretch, int64_t rows, const Products::X* x, const float* scale, \
                       float* sums) {                                                                              \
    few_tokens::accumulate<tokens, 1, Products>(stretch, rows, x, scale, sums);                                    \
  }
using IntProducts = few_tokens::IntProducts<bfloat16, stream::HalfOrder>;

extern "C" {
FEW_TOKENS(few_tokens_int, IntProducts, 1)
FEW_TOKENS(few_tokens_int, IntProducts, 2)
FEW_TOKENS(few_tokens_float, few_tokens::FloatProducts, 1)
FEW_TOKENS(few_tokens_float, few_tokens::FloatProducts, 4)
void decode_float(const uint8_t* packed, const float* scales, int64_t groups, float* panel) {
  decode_rows<many_tokens::WordF32>(packed, scales, groups, panel);
}
void multiply_float(const float* broadcast, const float* lanes, int depth, float* sums) {
  multiply<many_tokens::WordF32>(broadcast, lanes, depth, sums);
}
void dequantize_float(float absmax, const uint8_t* packed, int64_t bytes, float* out) {
  dequantize_block<false>(absmax, packed, bytes, out);
}
void dequantize_16(float absmax, const uint8_t* packed, int64_t bytes, bfloat16* out) {
  dequantize_block<false>(absmax, packed, bytes, out);
}
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
using Bf16Products = few_tokens::Bf16Products<stream::HalfOrder>;
FEW_TOKENS(few_tokens_bf16, Bf16Products, 1)
FEW_TOKENS(few_tokens_bf16, Bf16Products, 6)
void decode_bf16(const uint8_t* packed, const float* scales, int64_t groups, uint32_t* panel) {
  decode_rows<panel::WordBf16>(packed, scales, groups, panel);
}
void multiply_bf16(const uint32_t* broadcast, const uint32_t* lanes, int depth, float* sums) {
  multiply<panel::WordBf16>(broadcast, lanes, depth, sums);
}
#endif
}
