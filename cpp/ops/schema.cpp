// The operators' names and signatures. Kernels: cpu.cpp and cuda/ops.cpp; fake kernels and autograd: Python.
#include "cpp/ops/stable.h"

STABLE_TORCH_LIBRARY(qlora, m) {
  const auto define = [&](const std::string& schema) { m.def(schema.c_str()); };
  const std::string code = "str code=\"nf4\"";  // cpp/format/codes.h has the names
  define("quantize_nf4(Tensor w, int block_size, " + code + ") -> (Tensor packed, Tensor absmax)");
  define("search_absmax_nf4(Tensor w, Tensor importance, int block_size, " + code + ") -> Tensor absmax");
  define("encode_nf4(Tensor w, Tensor absmax, int block_size, Tensor? feedback=None, Tensor? order=None, " + code +
         ") -> Tensor packed");
  define("encode_nf4_stochastic(Tensor w, Tensor absmax, int block_size, int seed, " + code + ") -> Tensor packed");
  m.def(
      "quantize_absmax(Tensor absmax, int nested_block_size) -> "
      "(Tensor codes, Tensor nested_absmax, Tensor nested_offset)");
  m.def("dequantize_absmax(Tensor codes, Tensor nested_absmax, Tensor nested_offset, int nested_block_size) -> Tensor");
  const std::string packed =
      "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, int block_size, "
      "int nested_block_size";
  define("dequantize_nf4(" + packed + ", SymInt[] shape, ScalarType dtype, " + code + ") -> Tensor");
  const std::string factors = "Tensor? lora_a, Tensor? lora_b, float scaling";
  const std::string dropout = "float dropout_p, SymInt seed, Tensor? seed_tensor=None";
  const std::string defaults = "float dropout_p=0.0, SymInt seed=0, Tensor? seed_tensor=None";
  const std::string given = "Tensor? h=None, Tensor? g=None";

  const std::string linear =
      "(Tensor x, " + packed + ", SymInt out_features, Tensor? bias, " + factors + ", " + dropout + ", " + code + ")";
  const std::string dx =
      "(Tensor dy, " + packed + ", SymInt in_features, " + factors + ", " + dropout + ", " + code + ")";
  define("linear_nf4" + linear + " -> Tensor");
  define("linear_nf4_with_h" + linear + " -> (Tensor y, Tensor h)");
  define("linear_nf4_dx" + dx + " -> Tensor");
  define("linear_nf4_dx_with_g" + dx + " -> (Tensor dx, Tensor g)");
  define("linear_nf4_dlora(Tensor dy, Tensor x, Tensor lora_a, Tensor lora_b, float scaling, " + dropout + ", " +
         given + ") -> (Tensor da, Tensor db)");

  const std::string grouped_linear = "(Tensor x, Tensor offsets, " + packed + ", SymInt out_features, Tensor? bias, " +
                                     factors + ", " + defaults + ", " + code + ")";
  const std::string grouped_dx = "(Tensor dy, Tensor offsets, " + packed + ", SymInt in_features, " + factors + ", " +
                                 defaults + ", " + code + ")";
  define("grouped_linear_nf4" + grouped_linear + " -> Tensor");
  define("grouped_linear_nf4_with_h" + grouped_linear + " -> (Tensor y, Tensor h)");
  define("grouped_linear_nf4_dx" + grouped_dx + " -> Tensor");
  define("grouped_linear_nf4_dx_with_g" + grouped_dx + " -> (Tensor dx, Tensor g)");
  define("grouped_linear_nf4_dlora(Tensor dy, Tensor x, Tensor offsets, Tensor lora_a, Tensor lora_b, float scaling, " +
         defaults + ", " + given + ") -> (Tensor da, Tensor db)");
}
