// The kernels compiled for NEON with BF16 (flags: sources.cmake).
#define QLORA_ISA neon_bf16

#include "cpp/cpu/codec/dequantize-inl.h"
#include "cpp/cpu/codec/encode-inl.h"
#include "cpp/cpu/codec/encode_stochastic-inl.h"
#include "cpp/cpu/codec/quantize-inl.h"
#include "cpp/cpu/codec/search_absmax-inl.h"
#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/few_tokens/dx_float-inl.h"
#include "cpp/cpu/few_tokens/forward_bf16-inl.h"
#include "cpp/cpu/few_tokens/forward_float-inl.h"
#include "cpp/cpu/few_tokens/forward_int-inl.h"
#include "cpp/cpu/float64/linear.h"
#include "cpp/cpu/many_tokens/linear_bf16-inl.h"
#include "cpp/cpu/many_tokens/linear_float-inl.h"

namespace qlora::cpu {

const Kernels& neon_bf16_kernels() {
  static constexpr Kernels kernels = {
      .isa = &kNeonBf16Isa,
      .quantize_nf4 = neon_bf16::quantize_nf4,
      .search_absmax_nf4 = neon_bf16::search_absmax_nf4,
      .encode_nf4 = neon_bf16::encode_nf4,
      .encode_nf4_with_feedback = neon_bf16::encode_nf4_with_feedback,
      .encode_nf4_stochastic = neon_bf16::encode_nf4_stochastic,
      .quantize_absmax = neon_bf16::quantize_absmax,
      .dequantize_absmax = neon_bf16::dequantize_absmax,
      .dequantize_nf4 = neon_bf16::dequantize_nf4,
      .forward =
          {
              .few_tokens_int = neon_bf16::few_tokens::forward_int,
              .few_tokens_bf16 = neon_bf16::few_tokens::forward_bf16,
              .few_tokens_float = neon_bf16::few_tokens::forward_float,
              .many_tokens_bf16 = neon_bf16::many_tokens::forward_bf16,
              .many_tokens_float = neon_bf16::many_tokens::forward_float,
              .float64 = float64::forward,
          },
      .dx =
          {
              .few_tokens_float = neon_bf16::few_tokens::dx_float,
              .many_tokens_bf16 = neon_bf16::many_tokens::dx_bf16,
              .many_tokens_float = neon_bf16::many_tokens::dx_float,
              .float64 = float64::dx,
          },
      .dlora =
          {
              .many_tokens_bf16 = neon_bf16::many_tokens::dlora_bf16,
              .many_tokens_float = neon_bf16::many_tokens::dlora_float,
              .float64 = float64::dlora,
          },
  };
  return kernels;
}

}  // namespace qlora::cpu
