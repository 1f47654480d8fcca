// The kernels compiled for NEON (flags: sources.cmake).
#define QLORA_ISA neon

#include "cpp/cpu/codec/dequantize-inl.h"
#include "cpp/cpu/codec/encode-inl.h"
#include "cpp/cpu/codec/encode_stochastic-inl.h"
#include "cpp/cpu/codec/quantize-inl.h"
#include "cpp/cpu/codec/search_absmax-inl.h"
#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/few_tokens/dx_float-inl.h"
#include "cpp/cpu/few_tokens/forward_float-inl.h"
#include "cpp/cpu/few_tokens/forward_int-inl.h"
#include "cpp/cpu/float64/linear.h"
#include "cpp/cpu/many_tokens/linear_float-inl.h"

namespace qlora::cpu {

const Kernels& neon_kernels() {
  static constexpr Kernels kernels = {
      .isa = &kNeonIsa,
      .quantize_nf4 = neon::quantize_nf4,
      .search_absmax_nf4 = neon::search_absmax_nf4,
      .encode_nf4 = neon::encode_nf4,
      .encode_nf4_with_feedback = neon::encode_nf4_with_feedback,
      .encode_nf4_stochastic = neon::encode_nf4_stochastic,
      .quantize_absmax = neon::quantize_absmax,
      .dequantize_absmax = neon::dequantize_absmax,
      .dequantize_nf4 = neon::dequantize_nf4,
      .forward =
          {
              .few_tokens_int = neon::few_tokens::forward_int,
              .few_tokens_float = neon::few_tokens::forward_float,
              .many_tokens_float = neon::many_tokens::forward_float,
              .float64 = float64::forward,
          },
      .dx =
          {
              .few_tokens_float = neon::few_tokens::dx_float,
              .many_tokens_float = neon::many_tokens::dx_float,
              .float64 = float64::dx,
          },
      .dlora =
          {
              .many_tokens_float = neon::many_tokens::dlora_float,
              .float64 = float64::dlora,
          },
  };
  return kernels;
}

}  // namespace qlora::cpu
