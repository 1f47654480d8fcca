// The arguments of the linear operators, each a struct that is filled once from the dispatcher's stack. `each` visits
// the fields in the order of the operator's schema (schema.cpp).
#pragma once

#include <cstring>
#include <string>

#include "cpp/format/codes.h"
#include "cpp/ops/stable.h"

namespace qlora {

// The argument `code`: the name of a table in cpp/format/codes.h. Which one it is, is asked by checks::code.
struct CodeName {
  const CodeTable* table = &table_of(Code::kNf4);  // null: there is no such name
  std::string unknown;                             // the name, if so

  CodeName() = default;
  explicit CodeName(const char* name) : table(nullptr) {
    for (const CodeTable& t : kCodeTables)
      if (std::strcmp(t.name, name) == 0) table = &t;
    if (!table) unknown = name;
  }
};

}  // namespace qlora

// torch's own conversion, of std::string, copies the text and leaks the copy.
template <>
struct torch::stable::detail::ToImpl<qlora::CodeName> {
  static qlora::CodeName call(StableIValue value, uint64_t, bool) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    const char* text = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
    qlora::CodeName name(text);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return name;
  }
};

namespace qlora {

// A packed weight. `code` comes last in every schema.
struct PackedArgs {
  Tensor packed, absmax;
  OptionalTensor nested_absmax, nested_offset;
  int64_t block_size = 0, nested_block_size = 0;
  CodeName code;

  template <class Visit>
  void each(const Visit& visit) {
    visit(packed), visit(absmax), visit(nested_absmax), visit(nested_offset), visit(block_size);
    visit(nested_block_size);
  }
};

struct LoraNumbers {
  double scaling = 1.0, dropout_p = 0.0;
  int64_t seed = 0;
  OptionalTensor seed_tensor;

  template <class Visit>
  void each(const Visit& visit) {
    visit(scaling), visit(dropout_p), visit(seed), visit(seed_tensor);
  }
};

struct LinearArgs {
  Tensor x;
  PackedArgs w;
  int64_t out_features = 0;
  OptionalTensor bias, lora_a, lora_b;
  LoraNumbers lora;

  template <class Visit>
  void each(const Visit& visit) {
    visit(x), w.each(visit), visit(out_features), visit(bias), visit(lora_a), visit(lora_b), lora.each(visit);
    visit(w.code);
  }
};

struct LinearDxArgs {
  Tensor dy;
  PackedArgs w;
  int64_t in_features = 0;
  OptionalTensor lora_a, lora_b;
  LoraNumbers lora;

  template <class Visit>
  void each(const Visit& visit) {
    visit(dy), w.each(visit), visit(in_features), visit(lora_a), visit(lora_b), lora.each(visit), visit(w.code);
  }
};

struct LoraGradArgs {
  Tensor dy, x, lora_a, lora_b;
  LoraNumbers lora;
  OptionalTensor h, g;

  template <class Visit>
  void each(const Visit& visit) {
    visit(dy), visit(x), visit(lora_a), visit(lora_b), lora.each(visit), visit(h), visit(g);
  }
};

// The same over experts, whose rows end at `offsets`.
struct GroupedLinearArgs : LinearArgs {
  Tensor offsets;

  template <class Visit>
  void each(const Visit& visit) {
    visit(x), visit(offsets), w.each(visit), visit(out_features), visit(bias), visit(lora_a), visit(lora_b);
    lora.each(visit), visit(w.code);
  }
};

struct GroupedLinearDxArgs : LinearDxArgs {
  Tensor offsets;

  template <class Visit>
  void each(const Visit& visit) {
    visit(dy), visit(offsets), w.each(visit), visit(in_features), visit(lora_a), visit(lora_b), lora.each(visit);
    visit(w.code);
  }
};

struct GroupedLoraGradArgs : LoraGradArgs {
  Tensor offsets;

  template <class Visit>
  void each(const Visit& visit) {
    visit(dy), visit(x), visit(offsets), visit(lora_a), visit(lora_b), lora.each(visit), visit(h), visit(g);
  }
};

}  // namespace qlora
