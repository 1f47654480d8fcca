// The limits of the architecture that is being compiled. Kernels of tiles beyond them are empty there, because they are
// never launched: cuda/tuning chooses other tiles. From 10.0 on, ptxas needs more registers for the same code.
#pragma once

namespace qlora::tile {

#if defined(__CUDA_ARCH__)
inline constexpr int kArch = __CUDA_ARCH__;
#else
inline constexpr int kArch = 0;
#endif

inline constexpr int kMostSharedBytes = (kArch >= 1200 ? 99 : 227) * 1024;  // dynamic shared memory of a CTA
inline constexpr int kMostFewTokens = kArch >= 1000 ? 8 : 16;               // of the forward for few tokens

}  // namespace qlora::tile
