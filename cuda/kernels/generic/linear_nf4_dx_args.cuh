// The arguments of the dX kernels, on mma.sync and in float32.
#pragma once

#include <cstdint>

#include "cpp/format/problem.h"
#include "cuda/tile/generic/block_scale.cuh"

namespace qlora::kernels {

struct DxArgs {
  const void* dy;         // [m, n]
  const uint8_t* packed;  // w [n, k]
  tile::ScaleView scales;
  tile::CodeView code;
  const void* lora_a;  // [rank, k]
  const void* g;       // [m, rank]
  void* dx;            // [m, k]
  float* partials;     // [tiles][splits][...] in fragment order; unused with one split
  uint32_t* tickets;   // [tiles], zero before the launch; unused with one split
  int64_t m, n, k, rank;
  int64_t rows_per_split;  // a multiple of kDxStageRows
  int32_t splits, token_tiles;
  Dropout dropout;
};

}  // namespace qlora::kernels
