// Launches dequantize_nf4.
#include "cuda/kernels/generic/dequantize_nf4.cuh"

#include "cuda/launch/generic/codec.h"
#include "cuda/launch/launch.h"
#include "cuda/launch/types.h"
#include "cuda/tuning/codec.h"

namespace qlora::cuda {
namespace {

struct Call {
  const uint8_t* packed;
  tile::ScaleView scales;
  tile::CodeView code;
  PackedPart part;
  PanelTerms terms;
  void* out;
  const Device& device;
  cudaStream_t stream;
};

template <class T, int kChunk, bool kReadSoon, bool kWide = false>
cudaError_t launch(const Call& call) {
  constexpr int kThreads = kCodecThreads;
  constexpr auto kKernel = kernels::dequantize_nf4_kernel<T, kChunk, kThreads, kReadSoon, kWide>;
  int ctas = 0;
  if (const cudaError_t error = ctas_per_sm<kKernel>(call.device, kThreads, 0, &ctas); error != cudaSuccess)
    return error;
  const auto& [first, rows, columns, stride] = call.part;
  const PanelTerms& t = call.terms;
  const int64_t out_stride = columns + (t.beside ? t.terms : 0);
  T* const out = static_cast<T*>(call.out);
  const kernels::DequantizePieces pieces{first, rows, columns, stride, ceil_div(columns, int64_t{kChunk}), out_stride};
  const kernels::DequantizeTerms<T> terms{static_cast<uint32_t>(t.terms),
                                          static_cast<uint32_t>(t.columns),
                                          static_cast<const T*>(t.values),
                                          t.rank,
                                          t.term_stride,
                                          t.column_stride,
                                          static_cast<const T*>(t.bias),
                                          out + (t.beside ? columns : rows * columns),
                                          t.beside ? 1 : t.columns,
                                          t.beside ? out_stride : 1};
  const int64_t work = ceil_div(rows * pieces.chunks, int64_t{kernels::kDequantizeRun} * (kThreads / tile::kWarp));
  return launch_kernel(kKernel, static_cast<unsigned>(codec_grid(work, ctas, call.device)), kThreads, 0, call.stream,
                       call.packed, call.scales, call.code, pieces, terms, out);
}

// A chunk of a single piece has at most one quantization block per lane. Rows of a panel are cut into smaller chunks,
// so that little of a row is left over, and blocks may begin anywhere in them. Chunks of wide codes fit all block
// sizes.
template <class T>
cudaError_t launch_chunk(const Call& call, bool read_soon, bool wide) {
  if (wide && call.part.rows > 1) return launch<T, 256, true, true>(call);
  if (wide) return read_soon ? launch<T, 512, true, true>(call) : launch<T, 512, false, true>(call);
  if (call.part.rows > 1) return launch<T, 256, true>(call);
  if (call.scales.scales.block_size < 32) return read_soon ? launch<T, 512, true>(call) : launch<T, 512, false>(call);
  if (call.scales.scales.block_size < 64) return read_soon ? launch<T, 1024, true>(call) : launch<T, 1024, false>(call);
  return read_soon ? launch<T, 2048, true>(call) : launch<T, 2048, false>(call);
}

}  // namespace

cudaError_t launch_dequantize_nf4(const Weight& w, const PackedPart& part, DType dtype, void* out, bool read_soon,
                                  const Device& device, cudaStream_t stream, const PanelTerms& terms) {
  if (part.rows == 0 || part.columns == 0) return cudaSuccess;
  const int64_t end = part.first + (part.rows - 1) * part.stride + part.columns;
  const Call call{w.packed,
                  tile::make_scale_view(w.scales, ceil_div(end, w.scales.block_size), w.code),
                  tile::make_code_view(w.code),
                  part,
                  terms,
                  out,
                  device,
                  stream};
  return with_type(dtype,
                   [&](auto element) { return launch_chunk<decltype(element)>(call, read_soon, is_wide(w.code)); });
}

}  // namespace qlora::cuda
