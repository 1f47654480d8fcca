// The kernel and the parameters that a linear operator runs with. QLORA_PRINT_KERNELS=1 prints them, and
// QLORA_CUDA_KERNEL forces them.
#pragma once

#include <cstdint>
#include <string>

#include "cpp/format/problem.h"
#include "cuda/tuning/device.h"

namespace qlora::cuda {

enum class Kernel {
  kFewTokens,    // bfloat16 and float16, up to 16 tokens, LoRA in the same launch (kernels/sm80/*_few_tokens.cuh)
  kTensorCores,  // bfloat16 and float16 of regular shapes, on mma.sync (kernels/sm80)
  kSm75,         // float16 of regular shapes in the forward, on the tensor cores of 7.5 (launch/sm75)
  kSm90,         // bfloat16 and float16 of regular shapes, on wgmma and TMA (kernels/sm90)
  kSm100,        // bfloat16 and float16 of regular shapes, single weights, on tcgen05 and TMA (kernels/sm100)
  kRagged,       // bfloat16 and float16 of any shape: float32 FMA in the forward, mma.sync elsewhere
  kExact,        // float32, float16 on 7.5, and dX of wide codes: every product is a float32 FMA (kernels/generic)
  kGemm,         // many tokens: decodes w, and multiplies on mma.sync (launch/sm80/linear_gemm.cu)
  kLibrary,      // many tokens: decodes w, and multiplies with torch's cuBLAS (launch/generic/linear_library.h)
};

inline constexpr Kernel kKernels[] = {Kernel::kFewTokens, Kernel::kTensorCores, Kernel::kSm75,
                                      Kernel::kSm90,      Kernel::kSm100,       Kernel::kRagged,
                                      Kernel::kExact,     Kernel::kGemm,        Kernel::kLibrary};

constexpr const char* kernel_name(Kernel kernel) {
  constexpr const char* kNames[] = {"few_tokens", "tensor_cores", "sm75", "sm90",   "sm100",
                                    "ragged",     "exact",        "gemm", "library"};
  return kNames[static_cast<int>(kernel)];
}

// A parameter is 0 if the kernel does not have it. `splits` and `ctas` are also 0 until the launcher's plan sets one of
// them: what fills the device depends on how many CTAs of the compiled kernel an SM holds.
struct Config {
  int64_t tokens = 0;   // per tile
  int64_t rows = 0;     // rows of w per tile of the forward
  int64_t ranks = 0;    // LoRA ranks per tile
  int64_t columns = 0;  // per tile of the gradients
  int64_t splits = 0;   // parts of a tile's sum, for CTAs that divide it; of the library, for panels one after another
  int64_t panel = 0;    // columns of the output whose weights are decoded at a time
  int64_t multicast = 0;  // CTAs with neighbouring outputs that receive each copy of the tokens' values
  int64_t ctas = 0;       // CTAs that divide the sums of all tiles (stream-K); of gemm, the most of a launch
};

struct Parameter {
  const char* name;
  int64_t Config::* value;
};
inline constexpr Parameter kParameters[] = {
    {"tokens", &Config::tokens}, {"rows", &Config::rows}, {"ranks", &Config::ranks}, {"columns", &Config::columns},
    {"splits", &Config::splits}, {"ctas", &Config::ctas}, {"panel", &Config::panel}, {"multicast", &Config::multicast}};

struct Choice {
  Kernel kernel = Kernel::kRagged;
  Config config;
};

// For example "tensor_cores tokens=64 rows=128 splits=4".
inline std::string describe(const Choice& choice) {
  std::string text = kernel_name(choice.kernel);
  for (const Parameter& p : kParameters) {
    if (const int64_t value = choice.config.*p.value) text += std::string(" ") + p.name + "=" + std::to_string(value);
  }
  return text;
}

constexpr bool has_offsets(const Weight& w) { return w.scales.offsets.form != OffsetForm::kNone; }

// Whether the problem reads a weight of more than 4 bits per code, which the kernels on tensor cores do not decode.
template <class Problem>
constexpr bool has_wide_code(const Problem& p) {
  if constexpr (requires { p.w; })
    return is_wide(p.w.code);
  else
    return false;
}

constexpr bool is_16_bit(DType dtype) { return dtype == DType::kBFloat16 || dtype == DType::kFloat16; }

// Whether the device runs all 16-bit kernels on mma.sync. Compute capability 7.5 lacks their instructions: bfloat16,
// and copies to shared memory that bypass registers.
constexpr bool has_tensor_core_kernels(const Device& device) { return device.arch >= 80; }

// The device's compute capability, for example "8.0".
inline std::string capability_text(const Device& device) {
  return std::to_string(device.arch / 10) + "." + std::to_string(device.arch % 10);
}

// `wish`, or `value` if `wish` is 0, which means that nothing is forced.
constexpr int64_t or_wish(int64_t wish, int64_t value) { return wish != 0 ? wish : value; }

}  // namespace qlora::cuda
