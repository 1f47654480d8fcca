// The CPU kernels compiled for avx2 (flags: CMakeLists.txt).
#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/codec/dynamic8_cells.h"
#include "cpp/cpu/few_tokens/code_tables.h"
#include "cpp/cpu/shared/scratch.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/cpu/isa/avx2/codec.h"

#define QLORA_STREAM "cpp/cpu/isa/avx2/stream.h"

namespace qlora::cpu {
namespace avx2 {
namespace {

#include "cpp/cpu/shared/pages-inl.h"
#include "cpp/cpu/codec/scales-inl.h"

#include "cpp/cpu/codec/codec-inl.h"
namespace panel {
#include "cpp/cpu/isa/avx2/panel.h"
}  // namespace panel
#include "cpp/cpu/few_tokens/linear-inl.h"

#include "cpp/cpu/many_tokens/linear-inl.h"  // for what the small kernels leave

}  // namespace
}  // namespace avx2

const Kernels kAvx2Kernels = {avx2::quantize_nf4, avx2::quantize_absmax, avx2::dequantize_absmax, avx2::dequantize_nf4,
                              avx2::linear_nf4,   avx2::linear_nf4_dx,   avx2::linear_nf4_dlora};

}  // namespace qlora::cpu
