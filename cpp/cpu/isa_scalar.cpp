// The CPU kernels compiled for scalar (flags: CMakeLists.txt).
#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/dynamic8_cells.h"
#include "cpp/cpu/scratch.h"
#include "cpp/cpu/unroll.h"
#include "cpp/cpu/vec_scalar.h"

namespace qlora::cpu {
namespace scalar {
namespace {

#include "cpp/cpu/pages-inl.h"
#include "cpp/cpu/scales-inl.h"

#include "cpp/cpu/codec-inl.h"
namespace panel {
#include "cpp/cpu/mma_scalar.h"
}  // namespace panel
#include "cpp/cpu/linear_small-inl.h"

#include "cpp/cpu/linear-inl.h"  // for what the small kernels leave

}  // namespace
}  // namespace scalar

const Kernels kScalarKernels = {scalar::quantize_nf4,    scalar::quantize_absmax, scalar::dequantize_absmax,
                                scalar::dequantize_nf4,  scalar::linear_nf4,      scalar::linear_nf4_dx,
                                scalar::linear_nf4_dlora};

}  // namespace qlora::cpu
