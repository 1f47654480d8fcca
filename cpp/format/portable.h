// Macros for functions that host and device code share without including a CUDA header, for functions that are always
// inlined, and for symbols that a library exports (all others are hidden: CMakeLists.txt).
#pragma once

// For functions in headers that are included by files compiled for different processors (cpp/cpu/isa_*.cpp). If a call
// were not inlined, the linker would keep one copy for all callers, possibly the copy for a newer processor than the
// current one.
#if defined(__GNUC__) && !defined(__CUDACC__)
#define QLORA_INLINE [[gnu::always_inline]] inline
#else
#define QLORA_INLINE inline
#endif

#if defined(_WIN32)
#define QLORA_EXPORT __declspec(dllexport)
#elif defined(__GNUC__)
#define QLORA_EXPORT __attribute__((visibility("default")))
#else
#define QLORA_EXPORT
#endif

#if defined(__CUDACC__)
#define QLORA_HD __host__ __device__ __forceinline__
#else
#define QLORA_HD QLORA_INLINE
#endif
