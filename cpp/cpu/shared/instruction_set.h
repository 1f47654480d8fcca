// Which instruction set is being compiled, as the name QLORA_ISA of the namespace and of the folder in isa/ that belong
// to it. A translation unit compiles one: sources.cmake writes files that define QLORA_ISA before anything else. A
// fragment (*-inl.h) that is opened or compiled alone gets what the compiler's flags allow.
//
// A fragment puts its code into
//   namespace qlora::cpu::QLORA_ISA { namespace { ... } }
// without a name of its own to the linker, so that no set can end up with another set's copy of a function.
#pragma once

#ifndef QLORA_ISA
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define QLORA_ISA amx_bf16
#elif defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define QLORA_ISA avx512_bf16
#elif defined(__AVX512VBMI__)
#define QLORA_ISA avx512
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define QLORA_ISA avx2
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define QLORA_ISA neon_bf16
#elif defined(__aarch64__)
#define QLORA_ISA neon
#else
#define QLORA_ISA scalar
#endif
#endif

// #include QLORA_ISA_HEADER(panel.h) includes "cpp/cpu/isa/<name>/panel.h".
// clang-format off: a space would be one of the path
#define QLORA_ISA_HEADER(file) QLORA_ISA_TEXT(cpp/cpu/isa/QLORA_ISA/file)
// clang-format on
#define QLORA_ISA_TEXT(path) QLORA_ISA_QUOTED(path)
#define QLORA_ISA_QUOTED(path) #path
