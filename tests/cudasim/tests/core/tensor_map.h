// Tensor maps of matrices.
#pragma once
#include "cudasim.h"

namespace test {

inline cudasim::TensorMap map2d(void* p, int rows, int cols, int box_rows, int box_cols, int bytes, int swizzle) {
  cudasim::TensorMap t;
  t.global_address = uint64_t(p);
  t.global_dim[0] = uint32_t(cols);
  t.global_dim[1] = uint32_t(rows);
  t.global_stride_bytes[0] = uint64_t(cols) * bytes;
  t.box_dim[0] = uint16_t(box_cols);
  t.box_dim[1] = uint16_t(box_rows);
  t.element_stride[0] = t.element_stride[1] = 1;
  t.rank = 2;
  t.element_bytes = uint8_t(bytes);
  t.swizzle = uint8_t(swizzle);
  t.dtype = bytes == 2 ? 6 : 7;
  return t;
}
struct alignas(64) MapArg {
  cudasim::TensorMap t;
  char pad[128 - sizeof(cudasim::TensorMap)] = {};
};

}  // namespace test
