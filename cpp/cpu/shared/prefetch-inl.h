// Prefetches memory.
#pragma once

#include <cstdint>

#include "cpp/cpu/shared/instruction_set.h"

namespace qlora::cpu::QLORA_ISA {
namespace {

// Prefetches every line of [begin, begin + bytes). `begin` may be null if `bytes` is 0.
inline void prefetch(const void* begin, int64_t bytes) {
  constexpr int64_t kLine = 64;  // bytes
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(static_cast<const char*>(begin) + i);
}

}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
