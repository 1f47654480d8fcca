// Marks what host and device code share, without asking for a CUDA header; what is always inlined; and what a library
// shows to others, all else being hidden (CMakeLists.txt).
#pragma once

// Functions of headers that files compiled for different processors include (cpp/cpu/isa_*.cpp): were a call of one not
// inlined, the linker would keep one copy for all callers, perhaps that of a newer processor than the one at hand.
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
