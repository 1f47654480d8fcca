// The kernels' scratch for tests: each request gets memory of its own, of just its size and full of NaNs.
#pragma once

#include <cstdint>

namespace qlora::cpu {

bool is_scratch(const void* p, int64_t bytes);  // whether they lie in scratch that some thread has

}  // namespace qlora::cpu
