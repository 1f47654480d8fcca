// The kernels' scratch for tests: each request gets new memory of exactly its size, filled with NaNs.
#pragma once

#include <cstdint>

namespace qlora::cpu {

bool is_scratch(const void* p, int64_t bytes);  // whether they lie in scratch of some thread

}  // namespace qlora::cpu
