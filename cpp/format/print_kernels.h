// QLORA_PRINT_KERNELS=1 prints to stderr which kernel a linear operator runs with, one line per distinct problem:
//   qlora: linear_nf4 cpu m=1 n=4096 k=4096 rank=16 bfloat16 -> few_tokens_int isa=avx512
// CPU and CUDA share the format up to the arrow. The kernel's name and its parameters follow, and depend on the device.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <string>
#include <utility>

#include "cpp/format/grouped.h"

namespace qlora {

// The environment is read only once.
inline bool prints_kernels() {
  static const bool prints = [] {
    const char* value = std::getenv("QLORA_PRINT_KERNELS");
    return value != nullptr && std::strcmp(value, "1") == 0;
  }();
  return prints;
}

constexpr const char* dtype_name(DType dtype) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "float64"};
  return kNames[static_cast<int>(dtype)];
}

// Returns n and k.
inline std::pair<int64_t, int64_t> weight_shape(const LoraGradProblem& p) { return {p.n, p.k}; }
template <class Problem>
std::pair<int64_t, int64_t> weight_shape(const Problem& p) {
  return {p.w.n, p.w.k};
}

template <class Problem>
std::string problem_text(const Problem& p) {
  const auto [n, k] = weight_shape(p);
  const auto size = [](const char* name, int64_t value) { return std::string(name) + std::to_string(value); };
  std::string text =
      size("m=", p.m) + size(" n=", n) + size(" k=", k) + size(" rank=", p.lora.rank) + " " + dtype_name(p.dtype);
  if constexpr (requires { p.activations; }) text += p.activations == Activations::kInt8 ? " int8" : "";
  if constexpr (requires { p.w; }) {
    if (is_wide(p.w.code)) text += std::string(" code=") + wide_code(p.w.code).name;
  }
  return text;
}

template <class Problem>
std::string problem_text(const Grouped<Problem>& p) {
  return "experts=" + std::to_string(p.experts) + " " + problem_text(p.stack);
}

// `describe()` returns the text after the arrow. It is called only if the line is printed.
template <class Problem, class Describe>
void print_kernel(const char* op, const char* device, const Problem& p, const Describe& describe) {
  if (!prints_kernels()) [[likely]]
    return;
  const std::string line = std::string("qlora: ") + op + " " + device + " " + problem_text(p) + " -> " + describe();
  static std::mutex mutex;
  static std::set<std::string> printed;
  const std::lock_guard lock(mutex);
  if (printed.insert(line).second) std::fprintf(stderr, "%s\n", line.c_str());
}

}  // namespace qlora
