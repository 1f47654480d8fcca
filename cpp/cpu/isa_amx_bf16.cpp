// The table of AMX with BF16: AVX-512's, and the kernels of the tile unit.
#define QLORA_ISA amx_bf16

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/parts/parts.h"

namespace qlora::cpu {

const Kernels& amx_bf16_kernels() {
  static const Kernels kernels = [] {
    Kernels k = avx512_bf16_kernels();
    k.isa = &kAmxBf16Isa;
    k.forward[Kernel::kManyTokensTiles] = amx_bf16::parts::run<Kernel::kManyTokensTiles>;
    k.dx[Kernel::kManyTokensTiles] = amx_bf16::parts::run<Kernel::kManyTokensTiles>;
    k.dlora[Kernel::kManyTokensTiles] = amx_bf16::parts::run<Kernel::kManyTokensTiles>;
    return k;
  }();
  return kernels;
}

}  // namespace qlora::cpu
