// The CPU kernels compiled for scalar (flags: CMakeLists.txt).
#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/codec/dynamic8_cells.h"
#include "cpp/cpu/shared/scratch.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/cpu/isa/scalar/codec.h"

namespace qlora::cpu {
namespace scalar {
namespace {

#include "cpp/cpu/shared/pages-inl.h"
#include "cpp/cpu/codec/scales-inl.h"

#include "cpp/cpu/codec/codec-inl.h"
namespace panel {
#include "cpp/cpu/isa/scalar/panel.h"
}  // namespace panel
#include "cpp/cpu/few_tokens/linear-inl.h"

#include "cpp/cpu/many_tokens/linear-inl.h"  // for what the small kernels leave

}  // namespace
}  // namespace scalar

const Kernels kScalarKernels = {scalar::quantize_nf4,    scalar::quantize_absmax, scalar::dequantize_absmax,
                                scalar::dequantize_nf4,  scalar::linear_nf4,      scalar::linear_nf4_dx,
                                scalar::linear_nf4_dlora};

}  // namespace qlora::cpu
