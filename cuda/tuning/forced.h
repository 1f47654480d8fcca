// QLORA_CUDA_KERNEL=NAME[:key=value,...] forces a kernel, by the name that QLORA_PRINT_KERNELS prints, and its
// parameters, for example "sm90:tokens=128,splits=2". A request that cannot be met is an error, and never falls back to
// another kernel.
#pragma once

#include <algorithm>
#include <charconv>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "cpp/format/print_kernels.h"
#include "cuda/tuning/choose.h"

namespace qlora::cuda {

[[noreturn]] inline void refuse_forced(const std::string& text) {
  throw std::invalid_argument("QLORA_CUDA_KERNEL: " + text);
}

// Returns "a, b or c".
inline std::string alternatives(const std::vector<std::string>& words) {
  std::string text;
  for (size_t i = 0; i < words.size(); ++i) text += (i == 0 ? "" : i + 1 < words.size() ? ", " : " or ") + words[i];
  return text.empty() ? "nothing" : text;
}

template <class Problem>
std::string call_text(const char* op, const Problem& p) {
  return std::string(op) + " of " + problem_text(p);
}

// Returns the values that the kernel was compiled for. It returns none if the kernel lacks the parameter, or takes any
// number.
inline std::vector<int64_t> compiled_values(const Options& options, const Parameter& parameter) {
  std::vector<int64_t> values;
  const auto add = [&](const auto& from) {
    for (const int64_t value : from)
      if (value != 0) values.push_back(value);
  };
  if (parameter.value == &Config::tokens) add(options.tokens);
  if (parameter.value == &Config::ranks) add(options.ranks);
  if (parameter.value == &Config::multicast) add(options.multicast);
  return values;
}

inline bool has_parameter(const Options& options, const Parameter& parameter) {
  return (parameter.value == &Config::splits && options.splits) || (parameter.value == &Config::ctas && options.ctas) ||
         (parameter.value == &Config::panel && options.panel) || !compiled_values(options, parameter).empty();
}

// Parses one "key=value" of `kernel` into `wish`.
inline void read_wish(std::string_view text, Kernel kernel, const Options& options, Config* wish) {
  const size_t equals = text.find('=');
  const std::string_view key = text.substr(0, equals);
  std::vector<std::string> keys;
  for (const Parameter& parameter : kParameters) {
    if (!has_parameter(options, parameter)) continue;
    keys.push_back(parameter.name);
    if (key != parameter.name || equals == std::string_view::npos) continue;
    const std::string_view digits = text.substr(equals + 1);
    int32_t value = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    if (error != std::errc() || end != digits.data() + digits.size() || value < 1)
      refuse_forced("expected " + std::string(key) + "=NUMBER, from 1 to 2147483647, got " + std::string(text));
    wish->*parameter.value = value;
    return;
  }
  refuse_forced("expected KEY=NUMBER after " + std::string(kernel_name(kernel)) + ":, with the key " +
                alternatives(keys) + ", got " + std::string(text));
}

// Throws if `got`, the configuration that the kernel can run with, differs from `wish`.
template <class Problem>
void check_granted(const char* op, const Problem& p, const Config& wish, const Choice& got) {
  for (const Parameter& parameter : kParameters) {
    const int64_t wished = wish.*parameter.value, possible = got.config.*parameter.value;
    if (wished == 0 || wished == possible) continue;
    const auto value = [&](int64_t v) { return std::string(parameter.name) + "=" + std::to_string(v); };
    refuse_forced(std::string(kernel_name(got.kernel)) + " cannot run " + call_text(op, p) + " with " + value(wished) +
                  (possible == 0 ? std::string() : ": expected " + value(possible)));
  }
}

// Returns the choice that `forced`, the variable's value, asks for. Throws std::invalid_argument if the problem or the
// device does not allow it. The launcher's plan sets `splits` only later, and then calls check_granted.
template <class Problem>
Choice choose_forced(std::string_view forced, const char* op, const Problem& p, const Device& device) {
  require_type(p, device);
  const std::string_view name = forced.substr(0, forced.find(':'));
  std::vector<std::string> names, accepting;
  const KernelRow<Problem>* row = nullptr;
  for (const Kernel kernel : kKernels) names.push_back(kernel_name(kernel));
  for (const KernelRow<Problem>& r : Kernels<Problem>::kRows) {
    if (!r.accepts(p, device)) continue;
    accepting.push_back(kernel_name(r.kernel));
    if (name == kernel_name(r.kernel)) row = &r;
  }
  if (std::find(names.begin(), names.end(), name) == names.end())
    refuse_forced("expected NAME or NAME:KEY=NUMBER,... with the name " + alternatives(names) + ", got " +
                  std::string(forced));
  if (row == nullptr)
    refuse_forced(std::string(name) + " does not take " + call_text(op, p) + " on compute capability " +
                  capability_text(device) + ": expected " + alternatives(accepting));

  Config wish;
  if (name.size() < forced.size()) {
    std::string_view left = forced.substr(name.size() + 1);
    for (bool more = true; more;) {
      const size_t comma = left.find(',');
      read_wish(left.substr(0, comma), row->kernel, row->options, &wish);
      more = comma != std::string_view::npos;
      if (more) left.remove_prefix(comma + 1);
    }
  }
  for (const Parameter& parameter : kParameters) {
    const std::vector<int64_t> values = compiled_values(row->options, parameter);
    const int64_t wished = wish.*parameter.value;
    if (wished == 0 || values.empty() || std::find(values.begin(), values.end(), wished) != values.end()) continue;
    std::vector<std::string> texts;
    for (const int64_t value : values) texts.push_back(std::to_string(value));
    refuse_forced("expected " + std::string(parameter.name) + "=" + alternatives(texts) + " of " + std::string(name) +
                  " for " + op + ", got " + std::to_string(wished));
  }
  const Choice choice = {row->kernel, row->config(p, device, wish)};
  check_granted(op, p, wish, choice);
  return choice;
}

}  // namespace qlora::cuda
