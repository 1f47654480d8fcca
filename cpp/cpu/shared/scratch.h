// The kernels' workspace: one buffer per thread and purpose. It grows as needed and is reused by later calls, because
// fresh pages cost more than the kernels that write them.
#pragma once

#include <cstdint>

namespace qlora::cpu {

enum class ScratchUse {
  kCall,    // of the calling thread, for all threads of a call
  kThread,  // of each thread
  kBefore,  // of the calling thread, for what it computes before it requests kCall
  kTokens,  // of the calling thread, for the tokens of each adapter
};

// 64-byte aligned, contents undefined, valid until the thread's next request for the same use.
void* scratch(ScratchUse use, int64_t bytes);

}  // namespace qlora::cpu
