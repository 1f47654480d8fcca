// The arguments of the operators that take a packed weight or LoRA. Each operator has a struct, and `fields_of` lists
// its fields in the order of the operator's schema. Three things follow from that list: the schema's text (schema.cpp),
// the values from the dispatcher's stack (value_error.h) and the C function for compiled code (c_shims.cpp). A new
// argument needs a field here and its use in cpp/ops/calls.h.
#pragma once

#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpp/format/code_name.h"
#include "cpp/format/problem.h"
#include "cpp/ops/stable.h"

namespace qlora {

// The argument `code` (cpp/format/code_name.h). checks::code returns the code it names.
struct CodeName {
  Code code = Code::kNf4;
  std::string error;  // what is wrong with the name, or empty

  CodeName() = default;
  explicit CodeName(const char* name) : error(find_code(name, &code)) {}
};

// The argument `activations`. checks::activations returns what it names.
struct ActivationsName {
  Activations activations = Activations::kExact;
  std::string error;  // what is wrong with the name, or empty

  ActivationsName() = default;
  explicit ActivationsName(const char* name) : error(find_activations(name, &activations)) {}
};

// An argument that is given as a text, from which it is constructed.
template <class T>
concept IsName = std::is_same_v<T, CodeName> || std::is_same_v<T, ActivationsName>;

}  // namespace qlora

// torch's own conversion to std::string copies the text and leaks the copy.
template <qlora::IsName Name>
struct torch::stable::detail::ToImpl<Name> {
  static Name call(StableIValue value, uint64_t, bool) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    const char* text = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
    Name name(text);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return name;
  }
};

namespace qlora {

// What a schema says about an argument besides its name. `type` defaults to that of the C++ type.
struct InSchema {
  const char* type = nullptr;
  const char* default_value = nullptr;
};
inline constexpr const char* kSymInt = "SymInt";
inline constexpr const char* kDefaultCode = "\"nf4\"";

template <class T>
inline constexpr const char* kSchemaType = nullptr;
template <>
inline constexpr const char* kSchemaType<Tensor> = "Tensor";
template <>
inline constexpr const char* kSchemaType<OptionalTensor> = "Tensor?";
template <>
inline constexpr const char* kSchemaType<int64_t> = "int";
template <>
inline constexpr const char* kSchemaType<double> = "float";
template <>
inline constexpr const char* kSchemaType<CodeName> = "str";
template <>
inline constexpr const char* kSchemaType<ActivationsName> = "str";
template <>
inline constexpr const char* kSchemaType<std::vector<int64_t>> = "SymInt[]";
template <>
inline constexpr const char* kSchemaType<ScalarType> = "ScalarType";

template <class T>
struct Field {
  const char* name;
  T& value;
  InSchema schema;
};
template <class T>
std::tuple<Field<T>> field(const char* name, T& value, InSchema schema = {}) {
  if (!schema.type) schema.type = kSchemaType<T>;
  return {{name, value, schema}};
}

// A packed weight. What `last_fields` lists comes last in every schema.
struct PackedArgs {
  Tensor packed, absmax;
  OptionalTensor nested_absmax, nested_offset;
  int64_t block_size = 0, nested_block_size = 0;
  CodeName code;
  OptionalTensor scale_table, offsets, offset_scale;

  auto fields() {
    return std::tuple_cat(field("packed", packed), field("absmax", absmax), field("nested_absmax", nested_absmax),
                          field("nested_offset", nested_offset), field("block_size", block_size),
                          field("nested_block_size", nested_block_size));
  }
  auto last_fields() {
    return std::tuple_cat(field("code", code, {.default_value = kDefaultCode}),
                          field("scale_table", scale_table, {.default_value = "None"}),
                          field("block_offsets", offsets, {.default_value = "None"}),
                          field("offset_scale", offset_scale, {.default_value = "None"}));
  }
};

struct LoraNumbers {
  double scaling = 1.0, dropout_p = 0.0;
  int64_t seed = 0;
  OptionalTensor seed_tensor;

  // Calls of operators over experts may omit dropout.
  auto fields(bool may_omit_dropout) {
    const auto none = [&](const char* value) { return may_omit_dropout ? value : nullptr; };
    return std::tuple_cat(field("scaling", scaling), field("dropout_p", dropout_p, {.default_value = none("0.0")}),
                          field("seed", seed, {kSymInt, none("0")}),
                          field("seed_tensor", seed_tensor, {.default_value = "None"}));
  }
};

// Which adapter each row uses, if lora_a [sum of ranks, K] and lora_b [N, sum of ranks] are stacks of several: adapter
// e has rows (of lora_b: columns) rank_offsets[e] .. rank_offsets[e + 1]. h and g are then [.., max_rank]. For experts,
// lora_a and lora_b have a slice per expert, and all slices are divided alike.
struct AdapterArgs {
  OptionalTensor of_row, rank_offsets, scalings, seeds;
  int64_t max_rank = 0;

  auto fields() {
    constexpr InSchema kNone{.default_value = "None"};
    return std::tuple_cat(field("adapter_of_row", of_row, kNone), field("rank_offsets", rank_offsets, kNone),
                          field("scalings", scalings, kNone), field("seeds", seeds, kNone),
                          field("max_rank", max_rank, {.default_value = "0"}));
  }
};

// The last argument of the operators that multiply by a packed weight.
inline auto activations_field(ActivationsName& activations) {
  return field("activations", activations, {.default_value = "\"exact\""});
}

struct DequantizeArgs {
  PackedArgs w;
  std::vector<int64_t> shape;
  ScalarType dtype = ScalarType::Float;
};
inline auto fields_of(DequantizeArgs& a) {
  return std::tuple_cat(a.w.fields(), field("shape", a.shape), field("dtype", a.dtype), a.w.last_fields());
}

struct MergeArgs {
  PackedArgs w;
  Tensor lora_a, lora_b;
  double scaling = 1.0;
  int64_t seed = 0;
};
inline auto fields_of(MergeArgs& a) {
  return std::tuple_cat(a.w.fields(), field("lora_a", a.lora_a), field("lora_b", a.lora_b), field("scaling", a.scaling),
                        field("seed", a.seed), a.w.last_fields());
}

// A linear operator's arguments are `inputs`, whose rows are tokens, and `others`.
struct LinearArgs {
  Tensor x;
  PackedArgs w;
  int64_t out_features = 0;
  OptionalTensor bias, lora_a, lora_b;
  LoraNumbers lora;
  AdapterArgs adapters;
  ActivationsName activations;

  auto inputs() { return field("x", x); }
  auto options() { return activations_field(activations); }
  auto others(bool may_omit_dropout) {
    return std::tuple_cat(w.fields(), field("out_features", out_features, {kSymInt}), field("bias", bias),
                          field("lora_a", lora_a), field("lora_b", lora_b), lora.fields(may_omit_dropout),
                          w.last_fields());
  }
};

struct LinearDxArgs {
  Tensor dy;
  PackedArgs w;
  int64_t in_features = 0;
  OptionalTensor lora_a, lora_b;
  LoraNumbers lora;
  AdapterArgs adapters;
  ActivationsName activations;

  auto inputs() { return field("dy", dy); }
  auto options() { return activations_field(activations); }
  auto others(bool may_omit_dropout) {
    return std::tuple_cat(w.fields(), field("in_features", in_features, {kSymInt}), field("lora_a", lora_a),
                          field("lora_b", lora_b), lora.fields(may_omit_dropout), w.last_fields());
  }
};

struct LoraGradArgs {
  Tensor dy, x, lora_a, lora_b;
  LoraNumbers lora;
  OptionalTensor h, g;
  AdapterArgs adapters;

  auto inputs() { return std::tuple_cat(field("dy", dy), field("x", x)); }
  auto options() { return std::tuple<>(); }
  auto others(bool may_omit_dropout) {
    return std::tuple_cat(field("lora_a", lora_a), field("lora_b", lora_b), lora.fields(may_omit_dropout),
                          field("h", h, {.default_value = "None"}), field("g", g, {.default_value = "None"}));
  }
};

template <class Args>
auto fields_of(Args& a) {
  return std::tuple_cat(a.inputs(), a.others(false), a.adapters.fields(), a.options());
}

// The same for experts, whose rows end at `offsets`.
template <class Args>
struct GroupedArgs : Args {
  Tensor offsets;
};
using GroupedLinearArgs = GroupedArgs<LinearArgs>;
using GroupedLinearDxArgs = GroupedArgs<LinearDxArgs>;
using GroupedLoraGradArgs = GroupedArgs<LoraGradArgs>;
template <class Args>
inline constexpr bool kOverExperts = requires(const Args& a) { a.offsets; };

template <class Args>
auto fields_of(GroupedArgs<Args>& a) {
  return std::tuple_cat(a.inputs(), field("offsets", a.offsets), a.others(true), a.adapters.fields(), a.options());
}

// Calls visit(field) for each of fields_of(args).
template <class Args, class Visit>
void for_each_field(Args& args, const Visit& visit) {
  std::apply([&](const auto&... field) { (visit(field), ...); }, fields_of(args));
}

}  // namespace qlora
