// The CPU kernels compiled for avx512 (flags: CMakeLists.txt).
#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/codec/dynamic8_cells.h"
#include "cpp/cpu/few_tokens/code_tables.h"
#include "cpp/cpu/shared/scratch.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/cpu/isa/avx512/codec.h"

#define QLORA_STREAM "cpp/cpu/isa/avx512/stream.h"

namespace qlora::cpu {
namespace avx512 {
namespace {

#include "cpp/cpu/shared/pages-inl.h"
#include "cpp/cpu/codec/scales-inl.h"

#include "cpp/cpu/codec/codec-inl.h"
namespace panel {
#include "cpp/cpu/isa/avx512/panel.h"
}  // namespace panel
#include "cpp/cpu/few_tokens/linear-inl.h"

#include "cpp/cpu/many_tokens/linear-inl.h"  // for what the small kernels leave

}  // namespace
}  // namespace avx512

const Kernels kAvx512Kernels = {avx512::quantize_nf4,    avx512::quantize_absmax, avx512::dequantize_absmax,
                                avx512::dequantize_nf4,  avx512::linear_nf4,      avx512::linear_nf4_dx,
                                avx512::linear_nf4_dlora};

}  // namespace qlora::cpu
