// The operators' names and signatures. The kernels are in cpp/ops/cpu.cpp and cuda/ops.cpp, the fake kernels and
// autograd in Python.
#include "cpp/ops/arguments.h"
#include "cpp/ops/stable.h"

namespace qlora {
namespace {

// Returns a schema's arguments, for example "(Tensor x, int block_size, ..)".
template <class Args>
std::string arguments() {
  Args args;
  std::string text;
  for_each_field(args, [&](const auto& field) {
    text += std::string(text.empty() ? "(" : ", ") + field.schema.type + " " + field.name;
    if (field.schema.default_value) text += std::string("=") + field.schema.default_value;
  });
  return text + ")";
}

}  // namespace
}  // namespace qlora

STABLE_TORCH_LIBRARY(qlora, m) {
  using namespace qlora;
  const auto define = [&](const std::string& schema) { m.def(schema.c_str()); };
  const std::string code = std::string("str code=") + kDefaultCode;
  define("quantize_nf4(Tensor w, int block_size, " + code + ") -> (Tensor packed, Tensor absmax)");
  define("search_absmax_nf4(Tensor w, Tensor importance, int block_size, " + code + ") -> Tensor absmax");
  define("encode_nf4(Tensor w, Tensor absmax, int block_size, Tensor? feedback=None, Tensor? order=None, " + code +
         ") -> Tensor packed");
  define("encode_nf4_stochastic(Tensor w, Tensor absmax, int block_size, int seed, " + code + ") -> Tensor packed");
  define("merge_lora_nf4" + arguments<MergeArgs>() + " -> Tensor merged");
  define(
      "quantize_absmax(Tensor absmax, int nested_block_size) -> "
      "(Tensor codes, Tensor nested_absmax, Tensor nested_offset)");
  define(
      "dequantize_absmax(Tensor codes, Tensor nested_absmax, Tensor nested_offset, int nested_block_size) -> Tensor");
  define("dequantize_nf4" + arguments<DequantizeArgs>() + " -> Tensor");

  define("linear_dense(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");
  define("linear_dense_dx(Tensor dy, Tensor weight) -> Tensor");

  const auto define_linear = [&](const std::string& name, const std::string& linear, const std::string& dx,
                                 const std::string& dlora) {
    define(name + linear + " -> Tensor");
    define(name + "_with_h" + linear + " -> (Tensor y, Tensor h)");
    define(name + "_dx" + dx + " -> Tensor");
    define(name + "_dx_with_g" + dx + " -> (Tensor dx, Tensor g)");
    define(name + "_dlora" + dlora + " -> (Tensor da, Tensor db)");
  };
  define_linear("linear_nf4", arguments<LinearArgs>(), arguments<LinearDxArgs>(), arguments<LoraGradArgs>());
  define_linear("grouped_linear_nf4", arguments<GroupedLinearArgs>(), arguments<GroupedLinearDxArgs>(),
                arguments<GroupedLoraGradArgs>());
}
