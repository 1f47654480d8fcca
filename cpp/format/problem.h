// Plain views of the operators' operands. Pointers are to host memory in cpp/cpu and to device memory in cuda/. All
// tensors are contiguous and row-major, and all counts are 64-bit. Shapes: x [m, k], w [n, k], y [m, n], lora_a [r, k],
// lora_b [n, r].
#pragma once

#include <cstdint>

#include "cpp/format/codes.h"
#include "cpp/format/dtypes.h"
#include "cpp/format/philox.h"
#include "cpp/format/scales.h"

namespace qlora {

// w [n, k]. Blocks run over the flat index i*k + j. So a block may span rows if k is not a multiple of block_size, and
// a byte may span rows if k is odd. Rows of wide codes consist of whole blocks, and of whole units.
struct Weight {
  const uint8_t* packed = nullptr;
  Code code = Code::kNf4;
  Scales scales;
  int64_t n = 0, k = 0;

  constexpr const CodeTable& table() const { return table_of(code); }
  constexpr int bits() const { return bits_of(code); }
  // Bytes of so many elements, if they begin a row, or a unit of wide codes. Of 4-bit codes, rounded down.
  constexpr int64_t bytes(int64_t elements) const { return elements * bits() / 8; }
};

// Returns whether every group of `columns` columns, counted from the start of a row, lies in one block. Kernels that
// decode so many weights with one scale require it.
QLORA_INLINE constexpr bool has_one_scale_per(int64_t columns, const Weight& w) {
  return w.k % columns == 0 && w.scales.block_size >= columns;
}

struct Lora {
  const void* a = nullptr;
  const void* b = nullptr;
  int64_t rank = 0;  // 0: no LoRA; a and b may then be null
  double scaling = 1.0;
  Dropout dropout;
  const struct Adapters* adapters = nullptr;  // each token uses one of these, and a and b are the stacks

  // The distance between rows of b, if b is a part of the columns of a stack. 0: the rank.
  int64_t b_stride = 0;
  constexpr int64_t b_row(int64_t row) const { return row * (b_stride ? b_stride : rank); }  // elements before it
};

// The adapters of a call whose tokens use different ones, or none. `rank` of the call's Lora is the width of h and g; a
// token's own rank may be smaller, and the rest of its h and g is zeros.
struct Adapters {
  const Lora* each = nullptr;
  int64_t count = 0;
  const int32_t* of_token = nullptr;  // [m]; -1: none
  int64_t stack_rank = 0;             // the sum of the ranks: da is [stack_rank, k], db [n, stack_rank]
};

// What meets W: x and dy · scale as they are, or rounded to int8, one unit per token and segment of kInt8Segment values
// (cpp/cpu/shared/int8_segment-inl.h). LoRA and offsets of dX take x and dy as they are.
enum class Activations : int { kExact, kInt8 };
inline constexpr int kInt8Segment = 64;

// y = x · wᵀ + h · bᵀ + bias, h = round(scaling · dropout(x) · aᵀ)
struct LinearProblem {
  DType dtype = DType::kFloat32;  // of x, bias, lora_a, lora_b, y
  Activations activations = Activations::kExact;
  int64_t m = 0;
  const void* x = nullptr;
  Weight w;
  const void* bias = nullptr;  // [n] or null
  Lora lora;
  void* y = nullptr;
  void* h = nullptr;  // [m, r], retained for the backward; null: not retained
};

// dx = dy · w + dropout_mask ∘ (g · a), g = round(scaling · dy · b)
struct LinearDxProblem {
  DType dtype = DType::kFloat32;
  Activations activations = Activations::kExact;
  int64_t m = 0;
  const void* dy = nullptr;  // [m, n]
  Weight w;
  Lora lora;
  void* dx = nullptr;  // [m, k]
  void* g = nullptr;   // [m, r], retained for the adapters' gradients; null: not retained
};

// da = gᵀ · dropout(x) [r, k], db = dyᵀ · h [n, r], with g and h as above. If g or h is null, it is computed.
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

// A dense weight [n, k] with elements of 16 bits.
struct DenseWeight {
  DType dtype = DType::kBFloat16;
  const void* data = nullptr;
  int64_t n = 0, k = 0;
};

// y = x · wᵀ + bias, in float32
struct DenseLinearProblem {
  int64_t m = 0;
  const float* x = nullptr;
  DenseWeight w;
  const float* bias = nullptr;  // [n] or null
  float* y = nullptr;
};

// dx = dy · w, in float32
struct DenseLinearDxProblem {
  int64_t m = 0;
  const float* dy = nullptr;
  DenseWeight w;
  float* dx = nullptr;
};

// packed = the codes of w + (scaling · b) · a, rounded stochastically under w's scales and offsets
struct MergeProblem {
  Weight w;
  const float* a = nullptr;  // [rank, k]
  const float* b = nullptr;  // [n, rank]
  int64_t rank = 0;
  float scaling = 1.0f;
  uint64_t seed = 0;
  uint8_t* packed = nullptr;
};

}  // namespace qlora
