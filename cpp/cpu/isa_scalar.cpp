// The kernels compiled for plain C++ (flags: sources.cmake).
#define QLORA_ISA scalar

#include "cpp/cpu/codec/dequantize-inl.h"
#include "cpp/cpu/codec/encode-inl.h"
#include "cpp/cpu/codec/encode_stochastic-inl.h"
#include "cpp/cpu/codec/quantize-inl.h"
#include "cpp/cpu/codec/search_absmax-inl.h"
#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/few_tokens/dx_float-inl.h"
#include "cpp/cpu/few_tokens/dx_int-inl.h"
#include "cpp/cpu/few_tokens/forward_bf16-inl.h"
#include "cpp/cpu/few_tokens/forward_float-inl.h"
#include "cpp/cpu/few_tokens/forward_int-inl.h"
#include "cpp/cpu/float64/linear.h"
#include "cpp/cpu/many_tokens/linear_float-inl.h"

namespace qlora::cpu {

const Kernels& scalar_kernels() {
  static constexpr Kernels kernels = {
      .isa = &kScalarIsa,
      .quantize_nf4 = scalar::quantize_nf4,
      .search_absmax_nf4 = scalar::search_absmax_nf4,
      .encode_nf4 = scalar::encode_nf4,
      .encode_nf4_with_feedback = scalar::encode_nf4_with_feedback,
      .encode_nf4_stochastic = scalar::encode_nf4_stochastic,
      .quantize_absmax = scalar::quantize_absmax,
      .dequantize_absmax = scalar::dequantize_absmax,
      .dequantize_nf4 = scalar::dequantize_nf4,
      .forward =
          {
              .few_tokens_int = scalar::few_tokens::forward_int,
              .few_tokens_bf16 = scalar::few_tokens::forward_bf16,
              .few_tokens_float = scalar::few_tokens::forward_float,
              .many_tokens_float = scalar::many_tokens::forward_float,
              .float64 = float64::forward,
          },
      .dx =
          {
              .few_tokens_int = scalar::few_tokens::dx_int,
              .few_tokens_float = scalar::few_tokens::dx_float,
              .many_tokens_float = scalar::many_tokens::dx_float,
              .float64 = float64::dx,
          },
      .dlora =
          {
              .many_tokens_float = scalar::many_tokens::dlora_float,
              .float64 = float64::dlora,
          },
  };
  return kernels;
}

}  // namespace qlora::cpu
