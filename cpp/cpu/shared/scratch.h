// The kernels' workspace: one buffer per thread and purpose. It grows as needed and later calls reuse it, because fresh
// pages cost more than the kernels that write them.
#pragma once

#include <cstdint>

namespace qlora::cpu {

enum class ScratchUse {
  kCall,    // prepared by the calling thread for all threads of one call
  kThread,  // each thread's own
  kBefore,  // computed by the calling thread before it prepares a call
};

// 64-byte aligned, contents undefined, valid until the thread's next request for the same use.
void* scratch(ScratchUse use, int64_t bytes);

}  // namespace qlora::cpu
