// Pools without threads. One runs all work as one piece, the other as the pieces that three threads would get.
#pragma once

#include "cpp/cpu/kernels.h"

namespace kernels_test {

inline constexpr qlora::cpu::Pool kOneThread = {[](int64_t count, int64_t, qlora::cpu::Pool::Body body, void* context) {
                                                  body(context, 0, count);
                                                  return true;
                                                },
                                                1};

inline constexpr qlora::cpu::Pool kPieces = {[](int64_t count, int64_t, qlora::cpu::Pool::Body body, void* context) {
                                               const int64_t piece = qlora::ceil_div(count, 3);
                                               for (int64_t begin = 0; begin < count; begin += piece)
                                                 body(context, begin, begin + piece < count ? begin + piece : count);
                                               return true;
                                             },
                                             3};

}  // namespace kernels_test
