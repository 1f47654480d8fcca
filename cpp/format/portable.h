// Everything that depends on the compiler or the format of object files: macros for functions that host and device code
// share without including a CUDA header, for functions that are always inlined, for symbols that a library exports (all
// others are hidden: CMakeLists.txt), and for symbols that may be missing. The compilers are GCC and Clang, on Windows
// too, which all have the attributes [[gnu::...]] and the functions __builtin_...; nvcc compiles what is QLORA_HD.
#pragma once

#include <cstdint>

// For functions in headers that are included by files compiled for different processors (cpp/cpu/isa_*.cpp). If a call
// were not inlined, the linker would keep one copy for all callers, possibly the copy for a newer processor than the
// current one.
#if defined(__GNUC__) && !defined(__CUDACC__)
#define QLORA_INLINE [[gnu::always_inline]] inline
#define QLORA_INLINE_LAMBDA __attribute__((always_inline))  // after the parameters of a lambda
#else
#define QLORA_INLINE inline
#define QLORA_INLINE_LAMBDA
#endif

#if defined(__CUDACC__)
#define QLORA_HD __host__ __device__ __forceinline__
#else
#define QLORA_HD QLORA_INLINE
#endif

// QLORA_EXPORT is for functions and objects. A class that is thrown from one library and caught in another is
// QLORA_EXPORT_TYPE: its type information has to be one and the same in both. On Windows the names are compared.
#if defined(_WIN32)
#define QLORA_EXPORT __declspec(dllexport)
#define QLORA_EXPORT_TYPE
#else
#define QLORA_EXPORT __attribute__((visibility("default")))
#define QLORA_EXPORT_TYPE QLORA_EXPORT
#endif

// Symbols of other libraries that may be missing, with some versions or in some programs. They are declared
// QLORA_OPTIONAL, and QLORA_FIND(library, symbol) is the symbol's address, or null. `library` is the name that it has
// on Windows, where references to libraries cannot be weak.
#if defined(_WIN32)
namespace qlora {
void* find_symbol(const char* library, const char* name);  // cpp/runtime/windows_symbols.cpp
}
#define QLORA_OPTIONAL
#define QLORA_FIND(library, symbol) reinterpret_cast<decltype(&symbol)>(qlora::find_symbol(library, #symbol))
#else
#if defined(__APPLE__)
#define QLORA_OPTIONAL __attribute__((weak_import))
#else
#define QLORA_OPTIONAL __attribute__((weak))
#endif
#define QLORA_FIND(library, symbol) (&symbol)
#endif

namespace qlora {

QLORA_INLINE bool multiply_overflows(int64_t a, int64_t b, int64_t* product) {
  return __builtin_mul_overflow(a, b, product);
}

}  // namespace qlora
