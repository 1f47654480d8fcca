// setmaxnreg: moves registers between the warpgroups of a CTA (PTX ISA 9.7.19.5, sm_90a). All warps of a warpgroup must
// execute it.
#pragma once

namespace qlora::ptx {

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace qlora::ptx
