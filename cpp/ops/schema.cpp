// The operators' names and signatures. Kernels: cpu.cpp and cuda/ops.cpp; fake kernels and autograd: Python.
#include "cpp/ops/stable.h"

STABLE_TORCH_LIBRARY(qlora, m) {
  m.def("quantize_nf4(Tensor w, int block_size) -> (Tensor packed, Tensor absmax)");
  m.def(
      "quantize_absmax(Tensor absmax, int nested_block_size) -> "
      "(Tensor codes, Tensor nested_absmax, Tensor nested_offset)");
  m.def("dequantize_absmax(Tensor codes, Tensor nested_absmax, Tensor nested_offset, int nested_block_size) -> Tensor");
  m.def(
      "dequantize_nf4(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, int block_size, "
      "int nested_block_size, SymInt[] shape, ScalarType dtype) -> Tensor");
  m.def(
      "linear_nf4(Tensor x, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, "
      "int block_size, int nested_block_size, SymInt out_features, Tensor? bias, Tensor? lora_a, Tensor? lora_b, "
      "float scaling, float dropout_p, SymInt seed, Tensor? seed_tensor=None) -> Tensor");
  m.def(
      "linear_nf4_dx(Tensor dy, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, "
      "int block_size, int nested_block_size, SymInt in_features, Tensor? lora_a, Tensor? lora_b, "
      "float scaling, float dropout_p, SymInt seed, Tensor? seed_tensor=None) -> Tensor");
  m.def(
      "linear_nf4_dlora(Tensor dy, Tensor x, Tensor lora_a, Tensor lora_b, float scaling, float dropout_p, "
      "SymInt seed, Tensor? seed_tensor=None) -> (Tensor da, Tensor db)");
  m.def(
      "grouped_linear_nf4(Tensor x, Tensor offsets, Tensor packed, Tensor absmax, Tensor? nested_absmax, "
      "Tensor? nested_offset, int block_size, int nested_block_size, SymInt out_features, Tensor? bias, "
      "Tensor? lora_a, Tensor? lora_b, float scaling, float dropout_p=0.0, SymInt seed=0, Tensor? seed_tensor=None) -> "
      "Tensor");
  m.def(
      "grouped_linear_nf4_dx(Tensor dy, Tensor offsets, Tensor packed, Tensor absmax, Tensor? nested_absmax, "
      "Tensor? nested_offset, int block_size, int nested_block_size, SymInt in_features, Tensor? lora_a, "
      "Tensor? lora_b, float scaling, float dropout_p=0.0, SymInt seed=0, Tensor? seed_tensor=None) -> Tensor");
  m.def(
      "grouped_linear_nf4_dlora(Tensor dy, Tensor x, Tensor offsets, Tensor lora_a, Tensor lora_b, float scaling, "
      "float dropout_p=0.0, SymInt seed=0, Tensor? seed_tensor=None) -> (Tensor da, Tensor db)");
}
