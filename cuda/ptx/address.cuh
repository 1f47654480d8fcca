// Addresses in the form that PTX instructions take.
#pragma once

#include <cstdint>

namespace qlora::ptx {

// The 32-bit address of shared memory that ld.shared, st.shared and cp.async take.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

}  // namespace qlora::ptx
