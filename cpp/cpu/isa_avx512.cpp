// The kernels compiled for AVX-512 (F, BW, VL, DQ, VBMI) (flags: sources.cmake).
#define QLORA_ISA avx512

#include "cpp/cpu/codec/dequantize-inl.h"
#include "cpp/cpu/codec/encode-inl.h"
#include "cpp/cpu/codec/encode_stochastic-inl.h"
#include "cpp/cpu/codec/quantize-inl.h"
#include "cpp/cpu/codec/search_absmax-inl.h"
#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/few_tokens/dx_float-inl.h"
#include "cpp/cpu/few_tokens/dx_int-inl.h"
#include "cpp/cpu/few_tokens/forward_float-inl.h"
#include "cpp/cpu/few_tokens/forward_int-inl.h"
#include "cpp/cpu/float64/linear.h"
#include "cpp/cpu/many_tokens/linear_float-inl.h"

namespace qlora::cpu {

const Kernels& avx512_kernels() {
  static constexpr Kernels kernels = {
      .isa = &kAvx512Isa,
      .quantize_nf4 = avx512::quantize_nf4,
      .search_absmax_nf4 = avx512::search_absmax_nf4,
      .encode_nf4 = avx512::encode_nf4,
      .encode_nf4_with_feedback = avx512::encode_nf4_with_feedback,
      .encode_nf4_stochastic = avx512::encode_nf4_stochastic,
      .quantize_absmax = avx512::quantize_absmax,
      .dequantize_absmax = avx512::dequantize_absmax,
      .dequantize_nf4 = avx512::dequantize_nf4,
      .forward =
          {
              .few_tokens_int = avx512::few_tokens::forward_int,
              .few_tokens_float = avx512::few_tokens::forward_float,
              .many_tokens_float = avx512::many_tokens::forward_float,
              .float64 = float64::forward,
          },
      .dx =
          {
              .few_tokens_int = avx512::few_tokens::dx_int,
              .few_tokens_float = avx512::few_tokens::dx_float,
              .many_tokens_float = avx512::many_tokens::dx_float,
              .float64 = float64::dx,
          },
      .dlora =
          {
              .many_tokens_float = avx512::many_tokens::dlora_float,
              .float64 = float64::dlora,
          },
  };
  return kernels;
}

}  // namespace qlora::cpu
