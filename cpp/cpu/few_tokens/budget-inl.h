// Limits of a call for few tokens: how much scratch it may use, and how much work is worth waking a thread.
#pragma once

#include <cstdint>

#include "cpp/cpu/kernels.h"
#include "cpp/cpu/shared/instruction_set.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace few_tokens {

inline constexpr int64_t kMaxScratchBytes = int64_t{1} << 21;  // per thread
inline constexpr int64_t kWorthThreads = int64_t{1} << 18;     // multiply-adds, which cost as much as waking a thread

// Runs `body` over [0, count) in the pool or, if that is not worthwhile, in the calling thread.
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
