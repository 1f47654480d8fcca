// Working memory of the kernels: one buffer a thread and purpose, which grows as needed and is reused by later calls,
// for fresh pages cost more than the kernels that would write them.
#pragma once

#include <cstdint>

namespace qlora::cpu {

enum class ScratchUse {
  kCall,    // what the calling thread prepares for all threads of one call
  kThread,  // what each thread works in
  kBefore,  // what the calling thread computes before it prepares a call
};

// 64-byte aligned, contents undefined, valid until the thread's next request for the same use.
void* scratch(ScratchUse use, int64_t bytes);

}  // namespace qlora::cpu
