// The CPU kernels compiled for avx2 (flags: CMakeLists.txt).
#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/dynamic8_cells.h"
#include "cpp/cpu/int_codes.h"
#include "cpp/cpu/scratch.h"
#include "cpp/cpu/unroll.h"
#include "cpp/cpu/vec_avx2.h"

#define QLORA_STREAM "cpp/cpu/stream_avx2.h"

namespace qlora::cpu {
namespace avx2 {
namespace {

#include "cpp/cpu/pages-inl.h"
#include "cpp/cpu/scales-inl.h"

#include "cpp/cpu/codec-inl.h"
namespace panel {
#include "cpp/cpu/mma_avx2.h"
}  // namespace panel
#include "cpp/cpu/linear_small-inl.h"

#include "cpp/cpu/linear-inl.h"  // for what the small kernels leave

}  // namespace
}  // namespace avx2

const Kernels kAvx2Kernels = {avx2::quantize_nf4, avx2::quantize_absmax, avx2::dequantize_absmax, avx2::dequantize_nf4,
                              avx2::linear_nf4,   avx2::linear_nf4_dx,   avx2::linear_nf4_dlora};

}  // namespace qlora::cpu
