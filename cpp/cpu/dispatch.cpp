#include "cpp/cpu/dispatch.h"

#include "cpp/cpu/isa/isa.h"

namespace qlora::cpu {
namespace {

const Kernels& table() {
#if QLORA_X86
  switch (current_isa()) {
    case Isa::kAvx512Bf16:
      return kAvx512Bf16Kernels;
    case Isa::kAvx512:
      return kAvx512Kernels;
    case Isa::kAvx2:
      return kAvx2Kernels;
    case Isa::kScalar:
      break;
  }
#endif
  return kScalarKernels;
}

}  // namespace

void quantize_nf4(const Pool& pool, DType dtype, const void* w, int64_t numel, int64_t block_size, uint8_t* packed,
                  float* absmax) {
  table().quantize_nf4(pool, dtype, w, numel, block_size, packed, absmax);
}
void quantize_absmax(const Pool& pool, const float* absmax, int64_t count, int64_t nested_block_size, uint8_t* codes,
                     float* nested_absmax, float* nested_offset) {
  table().quantize_absmax(pool, absmax, count, nested_block_size, codes, nested_absmax, nested_offset);
}
void dequantize_absmax(const Pool& pool, const Scales& scales, int64_t count, float* absmax) {
  table().dequantize_absmax(pool, scales, count, absmax);
}
void dequantize_nf4(const Pool& pool, const uint8_t* packed, const Scales& scales, int64_t numel, DType dtype,
                    void* out) {
  table().dequantize_nf4(pool, packed, scales, numel, dtype, out);
}
void linear_nf4(const Pool& pool, const LinearProblem& p) { table().linear_nf4(pool, p); }
void linear_nf4_dx(const Pool& pool, const LinearDxProblem& p) { table().linear_nf4_dx(pool, p); }
void linear_nf4_dlora(const Pool& pool, const LoraGradProblem& p) { table().linear_nf4_dlora(pool, p); }

}  // namespace qlora::cpu
