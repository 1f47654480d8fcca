// Marks what host and device code share, without asking for a CUDA header.
#pragma once

#if defined(__CUDACC__)
#define QLORA_HD __host__ __device__ __forceinline__
#else
#define QLORA_HD inline
#endif
