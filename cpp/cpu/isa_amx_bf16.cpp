// The table of AMX with BF16: AVX-512's, and the kernels of the tile unit.
#define QLORA_ISA amx_bf16

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/parts/parts.h"

namespace qlora::cpu {

const Kernels& amx_bf16_kernels() {
  static const Kernels kernels = [] {
    Kernels k = avx512_bf16_kernels();
    k.isa = &kAmxBf16Isa;
    k.forward.many_tokens_tiles = amx_bf16::parts::forward_many_tokens_tiles;
    k.dx.many_tokens_tiles = amx_bf16::parts::dx_many_tokens_tiles;
    k.dlora.many_tokens_tiles = amx_bf16::parts::dlora_many_tokens_tiles;
    return k;
  }();
  return kernels;
}

}  // namespace qlora::cpu
