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

kernels::DequantizePieces pieces_of(const PackedPart& part, int chunk, int64_t out_stride) {
  return {part.first, part.rows, part.columns, part.stride, ceil_div(part.columns, int64_t{chunk}), out_stride};
}

// How many times a CTA's worth of chunks there is.
int64_t work_of(const kernels::DequantizePieces& pieces) {
  return ceil_div(pieces.rows * pieces.chunks, int64_t{kernels::kDequantizeRun} * (kCodecThreads / tile::kWarp));
}

template <class T, int kChunk, bool kReadSoon, bool kWide = false>
cudaError_t launch(const Call& call) {
  constexpr int kThreads = kCodecThreads;
  constexpr auto kKernel = kernels::dequantize_nf4_kernel<T, kChunk, kThreads, kReadSoon, kWide>;
  int ctas = 0;
  if (const cudaError_t error = ctas_per_sm<kKernel>(call.device, kThreads, 0, &ctas); error != cudaSuccess)
    return error;
  const PanelTerms& t = call.terms;
  const int64_t rows = call.part.rows, columns = call.part.columns;
  const int64_t out_stride = columns + (t.beside ? t.terms : 0);
  T* const out = static_cast<T*>(call.out);
  const kernels::DequantizePieces pieces = pieces_of(call.part, kChunk, out_stride);
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
  return launch_kernel(kKernel, static_cast<unsigned>(codec_grid(work_of(pieces), ctas, call.device)), kThreads, 0,
                       call.stream, call.packed, call.scales, call.code, pieces, terms, out);
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

struct GroupedCall {
  Call first;
  WeightStride stride;
  const int64_t* offsets;
  int64_t experts;
};

template <class T, int kChunk, bool kWide>
cudaError_t launch(const GroupedCall& call) {
  constexpr int kThreads = kCodecThreads;
  constexpr auto kKernel = kernels::grouped_dequantize_nf4_kernel<T, kChunk, kThreads, kWide>;
  const Call& first = call.first;
  int ctas = 0;
  if (const cudaError_t error = ctas_per_sm<kKernel>(first.device, kThreads, 0, &ctas); error != cudaSuccess)
    return error;
  const kernels::DequantizePieces pieces = pieces_of(first.part, kChunk, first.part.columns);
  const dim3 grid(static_cast<unsigned>(codec_grid_per_expert(work_of(pieces), ctas, call.experts, first.device)),
                  static_cast<unsigned>(call.experts));
  return launch_kernel(kKernel, grid, kThreads, 0, first.stream, first.packed, first.scales, first.code, pieces,
                       call.stride, call.offsets, static_cast<T*>(first.out));
}

// The same choice as launch_chunk's, among fewer kernels.
template <class T>
cudaError_t launch_grouped_chunk(const GroupedCall& call, bool wide) {
  const bool rows = call.first.part.rows > 1;
  if (wide) return rows ? launch<T, 256, true>(call) : launch<T, 512, true>(call);
  if (rows) return launch<T, 256, false>(call);
  return call.first.scales.scales.block_size < 64 ? launch<T, 512, false>(call) : launch<T, 1024, false>(call);
}

Call call_of(const Weight& w, const PackedPart& part, const PanelTerms& terms, void* out, const Device& device,
             cudaStream_t stream) {
  const int64_t end = part.first + (part.rows - 1) * part.stride + part.columns;
  const tile::ScaleView scales = tile::make_scale_view(w.scales, ceil_div(end, w.scales.block_size), w.code);
  return {w.packed, scales, tile::make_code_view(w.code), part, terms, out, device, stream};
}

}  // namespace

cudaError_t launch_dequantize_nf4(const Weight& w, const PackedPart& part, DType dtype, void* out, bool read_soon,
                                  const Device& device, cudaStream_t stream, const PanelTerms& terms) {
  if (part.rows == 0 || part.columns == 0) return cudaSuccess;
  const Call call = call_of(w, part, terms, out, device, stream);
  return with_type(dtype,
                   [&](auto element) { return launch_chunk<decltype(element)>(call, read_soon, is_wide(w.code)); });
}

cudaError_t launch_grouped_dequantize_nf4(const Weight& first, const int64_t* offsets, int64_t experts,
                                          const PackedPart& part, DType dtype, void* out, const Device& device,
                                          cudaStream_t stream) {
  if (experts == 0 || part.rows == 0 || part.columns == 0) return cudaSuccess;
  const GroupedCall call{call_of(first, part, {}, out, device, stream), weight_stride(first), offsets, experts};
  return with_16_bit_type(
      dtype, [&](auto element) { return launch_grouped_chunk<decltype(element)>(call, is_wide(first.code)); });
}

}  // namespace qlora::cuda
