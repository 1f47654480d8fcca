// Plain views of what the operators work on. Pointers are to host memory in cpp/cpu and to device memory in cuda/; all
// tensors are contiguous and row-major, all counts 64-bit. Shapes: x [m, k], w [n, k], y [m, n], lora_a [r, k],
// lora_b [n, r].
#pragma once

#include <cstdint>

#include "cpp/format/dtypes.h"
#include "cpp/format/nf4.h"
#include "cpp/format/philox.h"

namespace qlora {

// The scales of a packed weight: float32 `absmax`, or (double quantization) `codes` with their nested scales. Exactly
// one of `absmax` and `codes` is set. Decode of a nested scale: code8[q] * nested_absmax + nested_offset, two
// roundings.
struct Scales {
  const float* absmax = nullptr;         // [blocks]
  const uint8_t* codes = nullptr;        // [blocks]
  const float* nested_absmax = nullptr;  // [ceil(blocks / nested_block_size)]
  const float* nested_offset = nullptr;  // [1]
  int64_t block_size = 64;
  int64_t nested_block_size = 256;
};

// w [n, k]. Blocks run over the flat index i*k + j, so a block may span rows when k is not a multiple of block_size,
// and a byte may when k is odd.
struct Weight {
  const uint8_t* packed = nullptr;
  Scales scales;
  int64_t n = 0, k = 0;
};

struct Lora {
  const void* a = nullptr;
  const void* b = nullptr;
  int64_t rank = 0;  // 0: none; a and b may then be null
  double scaling = 1.0;
  Dropout dropout;
};

// y = x · wᵀ + h · bᵀ + bias, h = round(scaling · dropout(x) · aᵀ)
struct LinearProblem {
  DType dtype = DType::kFloat32;  // of x, bias, lora_a, lora_b, y
  int64_t m = 0;
  const void* x = nullptr;
  Weight w;
  const void* bias = nullptr;  // [n] or null
  Lora lora;
  void* y = nullptr;
  void* h = nullptr;  // [m, r], for the backward; null: not wanted
};

// dx = dy · w + dropout_mask ∘ (g · a), g = round(scaling · dy · b)
struct LinearDxProblem {
  DType dtype = DType::kFloat32;
  int64_t m = 0;
  const void* dy = nullptr;  // [m, n]
  Weight w;
  Lora lora;
  void* dx = nullptr;  // [m, k]
  void* g = nullptr;   // [m, r], for the adapters' gradients; null: not wanted
};

// da = gᵀ · dropout(x) [r, k], db = dyᵀ · h [n, r], with g and h as above, computed here where they are null
struct LoraGradProblem {
  DType dtype = DType::kFloat32;
  int64_t m = 0, n = 0, k = 0;
  const void* x = nullptr;
  const void* dy = nullptr;
  Lora lora;
  const void* h = nullptr;  // [m, r]
  const void* g = nullptr;  // [m, r]
  void* da = nullptr;
  void* db = nullptr;
};

}  // namespace qlora
