#pragma once
#include "cpp/cpu/many_tokens_tiles/low_rank-inl.h"
namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens_tiles {
inline void dlora(const Pool&, const LoraGradProblem&) {}
}  // namespace many_tokens_tiles
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
