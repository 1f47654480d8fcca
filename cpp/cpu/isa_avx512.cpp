// The CPU kernels compiled for avx512 (flags: CMakeLists.txt).
#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/dynamic8_cells.h"
#include "cpp/cpu/int_codes.h"
#include "cpp/cpu/scratch.h"
#include "cpp/cpu/unroll.h"
#include "cpp/cpu/vec_avx512.h"

#define QLORA_STREAM "cpp/cpu/stream_avx512.h"

namespace qlora::cpu {
namespace avx512 {
namespace {

#include "cpp/cpu/pages-inl.h"
#include "cpp/cpu/scales-inl.h"

#include "cpp/cpu/codec-inl.h"
namespace panel {
#include "cpp/cpu/mma_avx512.h"
}  // namespace panel
#include "cpp/cpu/linear_small-inl.h"

#include "cpp/cpu/linear-inl.h"  // for what the small kernels leave

}  // namespace
}  // namespace avx512

const Kernels kAvx512Kernels = {avx512::quantize_nf4,    avx512::quantize_absmax, avx512::dequantize_absmax,
                                avx512::dequantize_nf4,  avx512::linear_nf4,      avx512::linear_nf4_dx,
                                avx512::linear_nf4_dlora};

}  // namespace qlora::cpu
