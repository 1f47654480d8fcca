// griddepcontrol: programmatic dependent launch, where a launch overlaps with the end of the launch before it in its
// stream (PTX ISA, sm_90). Code compiled for less than sm_90 is launched in order, and does nothing here.
#pragma once

namespace qlora::ptx {

// The next launch may start as soon as every CTA of this grid has called this or has ended, if that launch permits it
// (Start::kEarly in cuda/launch/cluster.h).
__device__ __forceinline__ void start_next_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the launch before this one has ended. Its writes are visible afterwards.
__device__ __forceinline__ void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace qlora::ptx
