// The kernels compiled for AMX with BF16 (flags: sources.cmake): those of the tile unit. All others are AVX-512's.
#define QLORA_ISA amx_bf16

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/many_tokens_tiles/linear-inl.h"

namespace qlora::cpu {

const Kernels& amx_bf16_kernels() {
  static const Kernels kernels = [] {
    Kernels k = avx512_bf16_kernels();
    k.isa = &kAmxBf16Isa;
    k.forward.many_tokens_tiles = amx_bf16::many_tokens_tiles::forward_tiles;
    k.dx.many_tokens_tiles = amx_bf16::many_tokens_tiles::dx_tiles;
    k.dlora.many_tokens_tiles = amx_bf16::many_tokens_tiles::dlora_tiles;
    return k;
  }();
  return kernels;
}

}  // namespace qlora::cpu
