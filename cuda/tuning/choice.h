// What a linear operator runs with: a kernel and its parameters. QLORA_PRINT_KERNELS=1 prints it, QLORA_CUDA_KERNEL
// forces it.
#pragma once

#include <cstdint>
#include <string>

#include "cpp/format/problem.h"

namespace qlora::cuda {

enum class Kernel {
  kFewTokens,    // bfloat16 and float16, up to 16 tokens, LoRA in the same launch (kernels/sm80/*_few_tokens.cuh)
  kTensorCores,  // bfloat16 and float16 of regular shape, on mma.sync (kernels/sm80)
  kSm90,         // the same, on wgmma and TMA (kernels/sm90)
  kRagged,       // bfloat16 and float16 of any shape: without tensor cores in the forward, on mma.sync elsewhere
  kExact,        // float32: every product a float32 FMA, any shape (kernels/any)
  kLibrary,      // many tokens: w is decoded, and torch's library multiplies (launch/any/linear_library.h)
};

inline constexpr Kernel kKernels[] = {Kernel::kFewTokens, Kernel::kTensorCores, Kernel::kSm90,
                                      Kernel::kRagged,    Kernel::kExact,       Kernel::kLibrary};

constexpr const char* kernel_name(Kernel kernel) {
  constexpr const char* kNames[] = {"few_tokens", "tensor_cores", "sm90", "ragged", "exact", "library"};
  return kNames[static_cast<int>(kernel)];
}

// 0 where the kernel does not have the parameter. `splits` is also 0 as long as it is not known: how many parts of a
// sum fill the device depends on how many CTAs of the compiled kernel an SM holds, so the launcher's plan sets it.
struct Config {
  int64_t tokens = 0;   // of a tile
  int64_t rows = 0;     // of w, of a tile of the forward
  int64_t ranks = 0;    // of LoRA, of a tile
  int64_t columns = 0;  // of a tile of the gradients
  int64_t splits = 0;   // CTAs that share a tile's sum
  int64_t panel = 0;    // columns of the output whose weights are decoded at a time
};

struct Parameter {
  const char* name;
  int64_t Config::* value;
};
inline constexpr Parameter kParameters[] = {{"tokens", &Config::tokens}, {"rows", &Config::rows},
                                            {"ranks", &Config::ranks},   {"columns", &Config::columns},
                                            {"splits", &Config::splits}, {"panel", &Config::panel}};

struct Choice {
  Kernel kernel = Kernel::kRagged;
  Config config;
};

// "tensor_cores tokens=64 rows=128 splits=4"
inline std::string describe(const Choice& choice) {
  std::string text = kernel_name(choice.kernel);
  for (const Parameter& p : kParameters) {
    if (const int64_t value = choice.config.*p.value) text += std::string(" ") + p.name + "=" + std::to_string(value);
  }
  return text;
}

constexpr bool is_16_bit(DType dtype) { return dtype == DType::kBFloat16 || dtype == DType::kFloat16; }

// `wish`, or `value` where nothing was wished for.
constexpr int64_t or_wish(int64_t wish, int64_t value) { return wish != 0 ? wish : value; }

}  // namespace qlora::cuda
