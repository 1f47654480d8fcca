// Lines of memory asked for before they are needed.
#pragma once

#include <cstdint>

#include "cpp/cpu/shared/instruction_set.h"

namespace qlora::cpu::QLORA_ISA {
namespace {

// Asks for every line of the `bytes` from `begin` on, which may be null where there are none.
inline void prefetch(const void* begin, int64_t bytes) {
  constexpr int64_t kLine = 64;  // bytes
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(static_cast<const char*>(begin) + i);
}

}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
