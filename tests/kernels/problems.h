// The problems of the tests. They are small, because emulated processors run them, too.
#pragma once

#include <cstdint>

namespace kernels_test {

enum class Inputs {
  kNormal,
  kOutliers,  // some of a token's elements are 10^4 times the rest
  kTiny,      // subnormal products (of float16: subnormal elements)
  kHuge,
};

enum class Weights {
  kNormal,
  kPermutation,  // one weight per row, in columns of its own if there are enough
  kSparse,       // one in 40 is not zero
  kOutliers,     // one per row is 10^5 times the rest
};

struct LinearShape {
  int64_t m, n, k, rank, block_size;
  bool double_quant;
  double dropout;
  bool bias;
  bool second_expert;  // of a stack: the weight, the adapter and dropout begin in the middle of the stack's
  Inputs inputs = Inputs::kNormal;
  Weights weights = Weights::kNormal;
};

inline constexpr LinearShape kLinearShapes[] = {
    {1, 96, 320, 16, 64, true, 0.0, true, false},
    {1, 70, 100, 1, 32, false, 0.0, true, false},
    {1, 33, 555, 0, 64, true, 0.0, false, false},
    {2, 33, 333, 5, 64, true, 0.2, true, true},  // rows of W begin in the middle of a byte
    {2, 40, 192, 3, 64, true, 0.0, false, false, Inputs::kOutliers},
    {3, 70, 100, 1, 32, false, 0.0, false, false},
    {4, 40, 1100, 8, 128, true, 0.0, true, false},  // two segments of x
    {4, 64, 256, 8, 64, false, 0.0, true, false, Inputs::kTiny},
    {5, 130, 64, 64, 4096, true, 0.3, true, true},
    {6, 119, 36, 30, 64, true, 0.0, true, false},
    {7, 17, 577, 3, 32, true, 0.5, true, false},
    {8, 24, 512, 0, 256, false, 0.0, true, true},
    {9, 50, 258, 7, 64, true, 0.0, false, false},
    {12, 21, 31, 2, 64, true, 0.1, true, false},
    {16, 64, 192, 16, 64, true, 0.0, true, true},
    {17, 33, 130, 9, 32, true, 0.2, true, true},
    {19, 40, 128, 4, 64, true, 0.0, true, false, Inputs::kOutliers},
    {24, 13, 1032, 4, 1024, true, 0.0, true, false},
    {33, 31, 95, 33, 64, false, 0.1, false, false},
    {18, 128, 192, 2, 32, true, 0.1, true, true},
    {20, 26, 96, 2, 32, true, 0.0, true, false, Inputs::kHuge},
    {48, 48, 64, 8, 64, true, 0.0, true, true},
    {64, 18, 128, 2, 64, true, 0.0, true, false},
    {65, 37, 160, 12, 128, true, 0.25, true, false},
    {130, 9, 100, 2, 64, true, 0.0, true, false},
    {300, 3, 33, 1, 64, true, 0.0, true, false},
    {1, 1, 1, 1, 32, false, 0.0, true, false},
    {3, 1, 40, 0, 64, true, 0.0, false, false},
    {2, 5, 2, 0, 64, true, 0.0, true, false},
    {0, 16, 64, 4, 64, true, 0.0, true, false},
    {18, 7, 64, 100, 64, true, 1.0, true, false},  // everything is dropped
    {2, 192, 192, 0, 64, false, 0.0, false, false, Inputs::kNormal, Weights::kPermutation},
    {16, 160, 192, 4, 64, true, 0.0, true, true, Inputs::kNormal, Weights::kPermutation},
    {5, 40, 333, 0, 32, false, 0.0, true, false, Inputs::kNormal, Weights::kPermutation},
    {3, 130, 1100, 0, 64, true, 0.0, false, false, Inputs::kNormal, Weights::kSparse},
    {17, 70, 258, 3, 128, false, 0.0, true, false, Inputs::kNormal, Weights::kSparse},
    {4, 140, 320, 0, 64, true, 0.0, false, false, Inputs::kNormal, Weights::kOutliers},
    {2, 40, 176, 3, 16, true, 0.0, true, true},  // every other row begins in the middle of a group of 32
    {3, 33, 333, 0, 16, false, 0.0, false, false},
    {5, 130, 1072, 4, 16, true, 0.0, true, false, Inputs::kNormal, Weights::kSparse},
    {20, 48, 192, 8, 16, true, 0.1, true, false},
    {33, 20, 555, 2, 4096, false, 0.0, true, false, Inputs::kNormal, Weights::kOutliers},
};

struct CodecShape {
  int64_t rows, columns, block_size, nested_block_size;
};
inline constexpr CodecShape kCodecShapes[] = {
    {1, 1, 16, 256},    {5, 67, 16, 256},   {16, 128, 16, 8},     {1, 1, 32, 256},   {1, 31, 32, 256},
    {3, 33, 64, 256},   {7, 64, 32, 16},    {64, 65, 64, 256},    {5, 333, 128, 3},  {40, 256, 64, 64},
    {17, 1024, 256, 1}, {9, 1500, 512, 20}, {3, 4097, 4096, 256}, {33, 96, 64, 256}, {2, 2050, 1024, 2}};

}  // namespace kernels_test
