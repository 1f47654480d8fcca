// The inner loops of the CPU kernels, each in a function of its own, for bench/cpu_static.py to count. Compiled with
// -DQLORA_ISA=<set> and the flags of that set.
#include "cpp/cpu/codec/dequantize-inl.h"
#include "cpp/cpu/few_tokens/forward_float-inl.h"
#include "cpp/cpu/few_tokens/forward_int-inl.h"
#include "cpp/cpu/many_tokens/multiply-inl.h"
#ifdef __x86_64__
#include "cpp/cpu/many_tokens/multiply_int-inl.h"
#endif
#include "cpp/cpu/many_tokens/weight-inl.h"
#include "cpp/cpu/many_tokens/word_f32-inl.h"
#ifdef __ARM_FEATURE_DOTPROD
#include "cpp/cpu/few_tokens/int8_accumulate-inl.h"
#include "cpp/cpu/many_tokens/multiply_int8-inl.h"
#endif
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
#include "cpp/cpu/few_tokens/forward_bf16-inl.h"
#endif
#ifdef __ARM_FEATURE_MATMUL_INT8
#include "cpp/cpu/few_tokens/forward_matrices-inl.h"
#endif

using namespace qlora;
using namespace qlora::cpu::QLORA_ISA;

namespace {

template <class W>
void decode_rows(const CodeTable& code, const uint8_t* packed, const float* scales, int64_t groups,
                 typename W::Word* panel) {
  const typename W::Values values = W::values_of(code);
  for (int64_t i = 0; i < groups; ++i) {
    W::decode_row(values, packed, scales[i], panel);
    packed += many_tokens::kGroup / 2, panel += many_tokens::kGroup / W::kElements;
  }
}

struct NothingElse {
  struct Constants {};
  Constants constants() const { return {}; }
  void step(Constants) {}
};
template <class W>
void multiply(const typename W::Word* broadcast, const typename W::Word* lanes, int depth, float* sums) {
  NothingElse nothing;
  many_tokens::multiply_tile<W, many_tokens::kDepth, panel::kAccumulators / 2, 2>(broadcast, lanes, depth, sums, true,
                                                                                  nothing);
}

}  // namespace

#define FEW_TOKENS(name, Products, tokens)                                                                      \
  void name##_##tokens(const Products& products, const few_tokens::RowSegments& segments, int64_t rows,         \
                       const Products::X* x, const float* scale, few_tokens::FirstChunks* first, float* sums) { \
    constexpr int kRows = tokens <= Products::kMaxPairedTokens ? 2 : 1;                                         \
    few_tokens::accumulate<tokens, kRows, Products>(products, segments, rows, x, scale, first, sums);           \
  }
#ifdef __ARM_FEATURE_MATMUL_INT8
using Int8Word = panel::MatrixInt8;
#elif defined(__ARM_FEATURE_DOTPROD)
using Int8Word = panel::WordInt8;
#endif
// Blocks of a segment or more, without offsets.
#define FEW_TOKENS_INT8(tokens)                                                                           \
  void few_tokens_int8_##tokens(const Int8Word::Values& values, const uint8_t* packed, int64_t row_bytes, \
                                const float* scales, const int32_t* x, float* sums) {                     \
    few_tokens_int8::multiply<Int8Word, 1, tokens>(values, {packed, row_bytes, scales, 0, x}, sums);      \
  }
using IntProducts = few_tokens::IntProducts<bfloat16, stream::HalfOrder, false>;
using FloatProducts = few_tokens::FloatProducts<false>;

extern "C" {
FEW_TOKENS(few_tokens_int, IntProducts, 1)
FEW_TOKENS(few_tokens_int, IntProducts, 2)
FEW_TOKENS(few_tokens_float, FloatProducts, 1)
FEW_TOKENS(few_tokens_float, FloatProducts, 4)
void decode_float(const CodeTable& code, const uint8_t* packed, const float* scales, int64_t groups, float* panel) {
  decode_rows<many_tokens::WordF32>(code, packed, scales, groups, panel);
}
void multiply_float(const float* broadcast, const float* lanes, int depth, float* sums) {
  multiply<many_tokens::WordF32>(broadcast, lanes, depth, sums);
}
void dequantize_float(const codec::Table<float>& table, const uint8_t* packed, int64_t bytes, float* out) {
  dequantize_block<false>(table, packed, bytes, out);
}
void dequantize_16(const codec::Table<bfloat16>& table, const uint8_t* packed, int64_t bytes, bfloat16* out) {
  dequantize_block<false>(table, packed, bytes, out);
}
#ifdef __x86_64__
FEW_TOKENS(few_tokens_int, IntProducts, 4)
FEW_TOKENS(few_tokens_int, IntProducts, 8)
void multiply_int(const many_tokens::IntPanels& in, float* sums, WeightLinePrefetcher& prefetcher) {
  many_tokens::multiply_int_tile<many_tokens::kLongChain, false, panel::kAccumulators / 2, 2>(in, sums, true,
                                                                                              prefetcher);
}
#endif
#ifdef __ARM_FEATURE_DOTPROD
FEW_TOKENS_INT8(1)
FEW_TOKENS_INT8(2)
FEW_TOKENS_INT8(4)
FEW_TOKENS_INT8(8)
// The products alone, without what scales the sums of a block.
void multiply_int8(const int32_t* broadcast, const int32_t* lanes, int words, Int8Word::Sum* sums) {
  Int8Word::Sum sum[panel::kInt8Height / Int8Word::kRows][2];
  many_tokens::start_sums<Int8Word>(nullptr, sum);
  many_tokens::add_products<Int8Word, many_tokens::kDepth>(broadcast, lanes, words, sum);
  __builtin_memcpy(sums, sum, sizeof(sum));
}
#endif
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
#ifdef __ARM_FEATURE_MATMUL_INT8
using MatrixProducts = few_tokens::MatrixProducts<bfloat16>;
FEW_TOKENS(few_tokens_matrix, MatrixProducts, 1)
FEW_TOKENS(few_tokens_matrix, MatrixProducts, 2)
FEW_TOKENS(few_tokens_matrix, MatrixProducts, 4)
FEW_TOKENS(few_tokens_matrix, MatrixProducts, 6)
#endif
using Bf16Products = few_tokens::Bf16Products<stream::HalfOrder>;
FEW_TOKENS(few_tokens_bf16, Bf16Products, 1)
FEW_TOKENS(few_tokens_bf16, Bf16Products, 6)
void decode_bf16(const CodeTable& code, const uint8_t* packed, const float* scales, int64_t groups, uint32_t* panel) {
  decode_rows<panel::WordBf16>(code, packed, scales, groups, panel);
}
void multiply_bf16(const uint32_t* broadcast, const uint32_t* lanes, int depth, float* sums) {
  multiply<panel::WordBf16>(broadcast, lanes, depth, sums);
}
#endif
}
