// Which instruction set is being compiled, as the name QLORA_ISA of the namespace and of the folder in isa/ that belong
// to it. A translation unit compiles one set: sources.cmake defines QLORA_ISA for its parts. Without a definition, as
// where an editor opens a fragment (*-inl.h), it is scalar.
//
// A fragment puts its code into
//   namespace qlora::cpu::QLORA_ISA { namespace { ... } }
// without a name of its own to the linker, so that no set can end up with another set's copy of a function.
#pragma once

#ifndef QLORA_ISA
#define QLORA_ISA scalar
#endif

// #include QLORA_ISA_HEADER(panel.h) includes "cpp/cpu/isa/<name>/panel.h".
// clang-format off: a space would be one of the path
#define QLORA_ISA_HEADER(file) QLORA_ISA_TEXT(cpp/cpu/isa/QLORA_ISA/file)
// clang-format on
#define QLORA_ISA_TEXT(path) QLORA_ISA_QUOTED(path)
#define QLORA_ISA_QUOTED(path) #path
