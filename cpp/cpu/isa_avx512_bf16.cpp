// The CPU kernels compiled for avx512_bf16 (flags: CMakeLists.txt).
#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/codec/dynamic8_cells.h"
#include "cpp/cpu/few_tokens/code_tables.h"
#include "cpp/cpu/isa/isa.h"
#include "cpp/cpu/shared/scratch.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/cpu/isa/avx512/codec.h"

#define QLORA_BF16_DOT 1  // vdpbf16ps is there
#define QLORA_STREAM "cpp/cpu/isa/avx512/stream.h"

namespace qlora::cpu {
namespace avx512_bf16 {
namespace {

#include "cpp/cpu/shared/pages-inl.h"
#include "cpp/cpu/codec/scales-inl.h"

#include "cpp/cpu/codec/codec-inl.h"
namespace panel {
#include "cpp/cpu/isa/avx512/panel.h"
#include "cpp/cpu/isa/avx512_bf16/panel.h"
}  // namespace panel
#include "cpp/cpu/few_tokens/linear-inl.h"

#include "cpp/cpu/many_tokens/linear-inl.h"  // for what the small kernels leave

}  // namespace
}  // namespace avx512_bf16

const Kernels kAvx512Bf16Kernels = {avx512_bf16::quantize_nf4,      avx512_bf16::quantize_absmax,
                                    avx512_bf16::dequantize_absmax, avx512_bf16::dequantize_nf4,
                                    avx512_bf16::linear_nf4,        avx512_bf16::linear_nf4_dx,
                                    avx512_bf16::linear_nf4_dlora};

}  // namespace qlora::cpu
