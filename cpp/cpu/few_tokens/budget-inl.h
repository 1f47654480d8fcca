// What a call for few tokens may spend: scratch, and threads that are woken.
#pragma once

#include <cstdint>

#include "cpp/cpu/kernels.h"
#include "cpp/cpu/shared/instruction_set.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace few_tokens {

inline constexpr int64_t kMaxScratchBytes = int64_t{1} << 21;  // of a thread
inline constexpr int64_t kWorthThreads = int64_t{1} << 18;     // multiply-adds: about what waking a thread costs

// Runs `body` over [0, count) in the pool, or right here where that is not worth waking a thread.
template <class Body>
inline void run(const Pool& pool, bool worthwhile, int64_t count, int64_t grain, Body& body) {
  if (worthwhile) {
    pool(count, grain, body);
  } else {
    body(int64_t{0}, count);
  }
}

}  // namespace few_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
