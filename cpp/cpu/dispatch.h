// One table of kernels an instruction set. isa_<name>.cpp compiles the *-inl.h sources with that set's flags and fills
// its table; dispatch.cpp sends each call of kernels.h to the table in use.
#pragma once

#include "cpp/cpu/kernels.h"

namespace qlora::cpu {

struct Kernels {
  decltype(&cpu::quantize_nf4) quantize_nf4;
  decltype(&cpu::quantize_absmax) quantize_absmax;
  decltype(&cpu::dequantize_absmax) dequantize_absmax;
  decltype(&cpu::dequantize_nf4) dequantize_nf4;
  decltype(&cpu::linear_nf4) linear_nf4;
  decltype(&cpu::linear_nf4_dx) linear_nf4_dx;
  decltype(&cpu::linear_nf4_dlora) linear_nf4_dlora;
};

extern const Kernels kScalarKernels;
#if QLORA_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;
#endif

}  // namespace qlora::cpu
