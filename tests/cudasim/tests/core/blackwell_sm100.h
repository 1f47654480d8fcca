// What blackwell_sm100.cu takes from test_blackwell.cpp.
#pragma once

#include <cstdint>

struct Operand {
  const void* image = nullptr;  // of shared memory, or of A in tensor memory: 128 lanes of 8 * steps columns
  int bytes = 0;                // 0: A is in tensor memory
  uint64_t descriptor = 0;      // without the address
  int step = 0;                 // bytes from one K = 16 to the next
};
enum Bug {
  NONE,
  NO_COMMIT_WAIT,
  NO_PROXY_FENCE,
  NO_STORE_WAIT,
  NO_DEALLOC,
  COLUMN,
  QUARTER,
  NO_LOAD_WAIT,
  DEALLOC_EARLY,
  OVERWRITE,
  NO_SYNC,
  ODD_COLUMNS,
  AFTER_RELINQUISH,
  TF32,
  UNEVEN_ADDRESS,
  NO_FENCE_BEFORE,
  NO_FENCE_AFTER
};
