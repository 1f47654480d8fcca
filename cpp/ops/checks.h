// Checks tensors, and turns them into the plain views of cpp/format/problem.h. This is the only place that checks the
// operators' arguments, for CPU and CUDA alike. A message names the argument, what was expected and what came.
#pragma once

#include <cmath>
#include <limits>
#include <memory>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "cpp/format/device_adapters.h"
#include "cpp/format/problem.h"
#include "cpp/ops/arguments.h"
#include "cpp/ops/stable.h"

namespace qlora::checks {

template <class... Parts>
inline void require(bool ok, const Parts&... parts) {
  if (ok) [[likely]]
    return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

inline std::string shape_text(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

inline const char* dtype_text(ScalarType t) { return torch::headeronly::toString(t); }

inline DType float_dtype(const char* name, ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      break;
  }
  require(false, name, ": expected float32, bfloat16 or float16, got ", dtype_text(t));
  return {};
}

// Python may pass None for a tensor, because the dispatcher can take the device from another argument.
inline void is_given(const char* name, const Tensor& t) { require(t.defined(), name, ": expected a tensor, got None"); }

// float64 exists for gradcheck, and only on the CPU.
inline DType compute_dtype(const char* name, const Tensor& t) {
  is_given(name, t);
  const DType dtype = float_dtype(name, t.scalar_type());
  require(dtype != DType::kFloat64 || t.is_cpu(), name, ": float64 is supported on the CPU only");
  return dtype;
}

inline DType storage_dtype(const char* name, ScalarType t) {
  require(t != ScalarType::Double, name, ": expected float32, bfloat16 or float16, got Double");
  return float_dtype(name, t);
}

inline std::string device_text(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "device ") + std::to_string(t.get_device_index());
}

inline void same_device(const char* name, const Tensor& t, const char* like_name, const Tensor& like) {
  is_given(name, t);
  const bool same =
      t.is_cpu() ? like.is_cpu()
                 : t.is_cuda() == like.is_cuda() && !like.is_cpu() && t.get_device_index() == like.get_device_index();
  if (!same) {
    require(false, name, ": expected on the device of ", like_name, " (", device_text(like), "), got ", device_text(t));
  }
}

inline void has_dtype(const char* name, const Tensor& t, ScalarType dtype) {
  is_given(name, t);
  require(t.scalar_type() == dtype, name, ": expected ", dtype_text(dtype), ", got ", dtype_text(t.scalar_type()));
}

inline void has_numel(const char* name, const Tensor& t, int64_t numel, const char* why) {
  if (t.numel() != numel) {
    require(false, name, ": expected ", numel, " elements (", why, "), got ", t.numel(), " in shape ", shape_text(t));
  }
}

// How many weights a call over experts has, each with rows of its own. None: the call has a single weight.
using Experts = std::optional<int64_t>;

inline constexpr int64_t kAnySize = -1;

// Checks the shape of a tensor; over experts, that of each slice. Sizes may be kAnySize.
inline void has_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> shape, const char* names,
                      Experts experts = {}) {
  is_given(name, t);
  int64_t i = experts ? 1 : 0;
  bool fits = t.dim() == i + static_cast<int64_t>(shape.size()) && (!experts || t.size(0) == *experts);
  for (const int64_t size : shape) {
    fits = fits && (size == kAnySize || t.size(i) == size);
    ++i;
  }
  if (fits) [[likely]]
    return;
  std::string expected = experts ? std::to_string(*experts) : "";
  for (const int64_t size : shape)
    expected += (expected.empty() ? "" : ", ") + (size == kAnySize ? "any" : std::to_string(size));
  require(false, name, ": expected shape [", expected, "] (", experts ? "experts, " : "", names, "), got ",
          shape_text(t));
}

// Checks that `t` has one slice per expert.
inline void is_stack(const char* name, const OptionalTensor& t, int64_t experts) {
  if (!t) return;
  is_given(name, *t);
  require(t->dim() > 0 && t->size(0) == experts, name, ": expected ", experts, " slices, one per expert, got shape ",
          shape_text(*t));
}

// A packed tensor with other strides is an error: copying it silently would cost memory.
inline void is_contiguous(const char* name, const Tensor& t) {
  if (!t.is_contiguous()) {
    require(false, name, ": expected a contiguous tensor, got shape ", shape_text(t), " with other strides");
  }
}

inline void block_size(const char* name, int64_t n) {
  require(is_block_size(n), name, ": expected a power of two from ", kMinBlockSize, " to ", kMaxBlockSize, ", got ", n);
}

inline void nested_block_size(int64_t n) {
  require(is_nested_block_size(n), "nested_block_size: expected an integer from 1 to ", kMaxNestedBlockSize, ", got ",
          n);
}

inline Code code(const CodeName& name) {
  require(name.error.empty(), name.error);
  return name.code;
}

// Of the operators that encode, which know codes of 4 bits only.
inline Code code_of_4_bits(const CodeName& name) {
  const Code found = code(name);
  require(!is_wide(found), "code: expected a code of 4 bits, got ", is_wide(found) ? wide_code(found).name : "");
  return found;
}

inline Activations activations(const ActivationsName& name) {
  require(name.error.empty(), name.error);
  return name.activations;
}

// Multiplies sizes, one at a time. A negative size is an error, and so is a product above kMaxElements. A size of 0
// does not lift the limit on the others, because the strides of an empty tensor are products of them.
class Count {
 public:
  explicit Count(const char* name) : name_(name) {}

  void times(int64_t size) {
    require(size >= 0, name_, ": expected sizes of 0 or more, got ", size);
    empty_ |= size == 0;
    int64_t product = 0;
    const bool wraps = multiply_overflows(product_, size > 1 ? size : 1, &product);
    require(!wraps && product <= kMaxElements, name_, ": expected at most 2^48 elements, got ", product_, " * ", size);
    product_ = product;
  }
  int64_t value() const { return empty_ ? 0 : product_; }

 private:
  const char* name_;
  int64_t product_ = 1;
  bool empty_ = false;
};

inline int64_t area(const char* name, int64_t rows, int64_t cols) {
  Count count(name);
  count.times(rows);
  count.times(cols);
  return count.value();
}

inline int64_t numel(const char* name, const Tensor& t) {
  Count count(name);
  for (int64_t i = 0; i < t.dim(); ++i) count.times(t.size(i));
  return count.value();
}

// Checks the 8-bit codes of absmax and their nested scales, for `weights` stacked weights.
inline Scales nested(const char* name, const Tensor& codes, const Tensor& nested_absmax, const Tensor& nested_offset,
                     int64_t block_size, int64_t nested_block, int64_t weights = 1) {
  has_dtype(name, codes, ScalarType::Byte);
  is_contiguous(name, codes);
  nested_block_size(nested_block);
  same_device("nested_absmax", nested_absmax, name, codes);
  same_device("nested_offset", nested_offset, name, codes);
  has_dtype("nested_absmax", nested_absmax, ScalarType::Float);
  has_dtype("nested_offset", nested_offset, ScalarType::Float);
  is_contiguous("nested_absmax", nested_absmax);
  is_contiguous("nested_offset", nested_offset);
  const int64_t blocks = weights == 0 ? 0 : codes.numel() / weights;  // per weight
  has_numel("nested_absmax", nested_absmax, weights * ceil_div(blocks, nested_block), "one per nested block");
  has_numel("nested_offset", nested_offset, weights, weights == 1 ? "a scalar" : "one per weight");
  return nested_scales(codes.const_data_ptr<uint8_t>(), nested_absmax.const_data_ptr<float>(),
                       nested_offset.const_data_ptr<float>(), block_size, nested_block);
}

// Checks that one optional tensor is float32, contiguous, on the device of `packed` and of that size.
inline const float* block_floats(const char* name, const OptionalTensor& t, const PackedArgs& p, int64_t numel,
                                 const char* why) {
  if (!t) return nullptr;
  same_device(name, *t, "packed", p.packed);
  has_dtype(name, *t, ScalarType::Float);
  is_contiguous(name, *t);
  has_numel(name, *t, numel, why);
  return t->const_data_ptr<float>();
}

// Uint8 codes with a table of their values.
inline Scales table_scales(const PackedArgs& p, int64_t nested_blocks, int64_t weights) {
  has_dtype("absmax", p.absmax, ScalarType::Byte);
  require(!p.nested_offset, "nested_offset: expected None with scale_table, got a tensor");
  Scales s;
  s.form = ScaleForm::kTable8;
  s.stored = p.absmax.const_data_ptr<uint8_t>();
  s.table = block_floats("scale_table", p.scale_table, p, weights * 256, "one per code");
  s.nested_absmax = block_floats("nested_absmax", p.nested_absmax, p, weights * nested_blocks, "one per nested block");
  s.block_size = p.block_size;
  s.nested_block_size = p.nested_block_size;
  return s;
}

inline Offsets offsets(const PackedArgs& p, int64_t blocks, int64_t nested_blocks, int64_t weights) {
  Offsets out;
  require(p.offsets || !p.offset_scale, "block_offsets: expected with offset_scale, got None");
  if (!p.offsets) return out;
  same_device("block_offsets", *p.offsets, "packed", p.packed);
  is_contiguous("block_offsets", *p.offsets);
  has_numel("block_offsets", *p.offsets, weights * blocks, "one per block");
  out.stored = p.offsets->const_data_ptr();
  out.unit = block_floats("offset_scale", p.offset_scale, p, weights * nested_blocks, "one per nested block");
  const ScalarType dtype = p.offsets->scalar_type();
  require(dtype == ScalarType::Byte || !out.unit, "block_offsets: expected Byte with offset_scale, got ",
          dtype_text(dtype));
  switch (dtype) {
    case ScalarType::Byte:
      out.form = out.unit ? OffsetForm::kScaled8 : OffsetForm::kZeroPoint8;
      break;
    case ScalarType::Float:
      out.form = OffsetForm::kFloat32;
      break;
    case ScalarType::Half:
      out.form = OffsetForm::kFloat16;
      break;
    case ScalarType::BFloat16:
      out.form = OffsetForm::kBFloat16;
      break;
    default:
      require(false, "block_offsets: expected Float, Half, BFloat16 or Byte, got ", dtype_text(dtype));
  }
  return out;
}

// `absmax` is float32, float16 or bfloat16; or uint8 codes with scale_table, or with both nested tensors. It has
// `blocks` entries per stacked weight.
inline Scales scales_alone(const PackedArgs& p, int64_t blocks, int64_t nested_blocks, int64_t weights) {
  same_device("absmax", p.absmax, "packed", p.packed);
  is_contiguous("absmax", p.absmax);
  has_numel("absmax", p.absmax, weights * blocks, "one per block");
  nested_block_size(p.nested_block_size);
  if (p.scale_table) return table_scales(p, nested_blocks, weights);
  require(p.nested_absmax || !p.nested_offset, "nested_absmax: expected with nested_offset, got None");
  require(p.nested_offset || !p.nested_absmax, "nested_offset: expected with nested_absmax, got None");
  if (p.nested_absmax) {
    return nested("absmax", p.absmax, *p.nested_absmax, *p.nested_offset, p.block_size, p.nested_block_size, weights);
  }
  Scales s = float_scales(nullptr, p.block_size);
  s.nested_block_size = p.nested_block_size;
  const ScalarType dtype = p.absmax.scalar_type();
  require(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
          "absmax: expected Float, Half or BFloat16 (Byte codes come with scale_table, or with nested_absmax and ",
          "nested_offset), got ", dtype_text(dtype));
  s.form = dtype == ScalarType::Float  ? ScaleForm::kFloat32
           : dtype == ScalarType::Half ? ScaleForm::kFloat16
                                       : ScaleForm::kBFloat16;
  s.stored = p.absmax.const_data_ptr();
  return s;
}

inline Scales scales(const PackedArgs& p, int64_t blocks, int64_t weights = 1) {
  is_given("absmax", p.absmax);
  const int64_t nested_blocks = is_nested_block_size(p.nested_block_size) ? ceil_div(blocks, p.nested_block_size) : 0;
  Scales s = scales_alone(p, blocks, nested_blocks, weights);
  s.offsets = offsets(p, blocks, nested_blocks, weights);
  return s;
}

// Rows of a wide code consist of whole blocks and units (cpp/format/packing.h).
inline void has_whole_blocks(Code code, int64_t k, int64_t block_size) {
  const int64_t unit = has_units(bits_of(code)) && block_size < kUnit ? kUnit : block_size;
  require(k % unit == 0, "packed: expected rows of a multiple of ", unit, " elements in ", wide_code(code).name,
          " with blocks of ", block_size, ", got ", k);
}

// Checks the weight [n, k], or those of experts, stacked as in cpp/format/grouped.h, and returns the first.
inline Weight weight(const PackedArgs& p, int64_t n, int64_t k, Experts experts = {}) {
  if (experts) {
    is_stack("absmax", p.absmax, *experts);
    is_stack("nested_absmax", p.nested_absmax, *experts);
    is_stack("nested_offset", p.nested_offset, *experts);
    is_stack("scale_table", p.scale_table, *experts);
    is_stack("block_offsets", p.offsets, *experts);
    is_stack("offset_scale", p.offset_scale, *experts);
  }
  const int64_t weights = experts.value_or(1);
  has_dtype("packed", p.packed, ScalarType::Byte);
  is_contiguous("packed", p.packed);
  const int64_t numel = area("packed", n, k);
  block_size("block_size", p.block_size);
  Weight w;
  w.code = code(p.code);
  w.n = n;
  w.k = k;
  if (is_wide(w.code)) has_whole_blocks(w.code, k, p.block_size);
  const int64_t bytes = packed_bytes(numel, w.bits());
  if (p.packed.numel() != weights * bytes) {
    require(false, "packed: expected ", weights * bytes, " bytes for ", weights * numel, " elements, got ",
            p.packed.numel(), " in shape ", shape_text(p.packed));
  }
  w.scales = scales(p, ceil_div(numel, p.block_size), weights);
  w.packed = p.packed.const_data_ptr<uint8_t>();
  return w;
}

inline int64_t shape_numel(const std::vector<int64_t>& shape) {
  Count count("shape");
  for (const int64_t size : shape) count.times(size);
  return count.value();
}

// If `seed_tensor` is given, it holds the seed. CUDA reads it when the kernel runs, so the host does not wait for it,
// and each replay of a captured graph draws new masks.
inline Dropout dropout(const LoraNumbers& numbers, const char* like_name, const Tensor& like) {
  const auto& [scaling, p, seed, seed_tensor] = numbers;
  require(p >= 0.0 && p <= 1.0, "dropout_p: expected a probability from 0 to 1, got ", p);
  Dropout out = make_dropout(p, static_cast<uint64_t>(seed));
  if (!seed_tensor) return out;
  same_device("seed_tensor", *seed_tensor, like_name, like);
  require(seed_tensor->scalar_type() == ScalarType::Long && seed_tensor->dim() == 0,
          "seed_tensor: expected a 0-dim int64 tensor, got ", dtype_text(seed_tensor->scalar_type()), " of shape ",
          shape_text(*seed_tensor));
  const int64_t* const at = seed_tensor->const_data_ptr<int64_t>();
  if (like.is_cpu())
    out.seed = static_cast<uint64_t>(*at);
  else
    out.device_seed = at;
  return out;
}

// Checks that a dense operand has the dtype and the device of `like`, and makes it contiguous (`keep` owns the data).
inline const void* operand(const char* name, const Tensor& t, const char* like_name, const Tensor& like, Tensor* keep) {
  same_device(name, t, like_name, like);
  require(t.scalar_type() == like.scalar_type(), name, ": expected the dtype of ", like_name, " (",
          dtype_text(like.scalar_type()), "), got ", dtype_text(t.scalar_type()));
  *keep = t.is_contiguous() ? t : stable::contiguous(t);
  return keep->const_data_ptr();
}

inline void scaling(double number) {
  require(std::abs(number) <= std::numeric_limits<float>::max(),
          "scaling: expected a finite number within float32's range, got ", number);
}

// LoRA's operands for m tokens, and what owns their data. lora_a [r, k] and lora_b [n, r] must be given together, over
// experts a stack each. r may be 0.
struct LoraOperands {
  Lora lora;
  Tensor a, b, adapter_of_row;
  std::vector<Lora> each;
  std::unique_ptr<Adapters> adapters;
  std::unique_ptr<DeviceAdapters> device_adapters;  // and what owns their data:
  Tensor rank_offsets, scalings, seeds;
};

inline LoraOperands lora(const OptionalTensor& a, const OptionalTensor& b, int64_t n, int64_t k,
                         const LoraNumbers& numbers, const char* like_name, const Tensor& like, int64_t m,
                         Experts experts) {
  LoraOperands out;
  out.lora.dropout = dropout(numbers, like_name, like);
  scaling(numbers.scaling);
  out.lora.scaling = numbers.scaling;
  require(a.has_value() || !b, "lora_a: expected with lora_b, got None");
  require(b.has_value() || !a, "lora_b: expected with lora_a, got None");
  if (!a) return out;
  has_shape("lora_a", *a, {kAnySize, k}, "rank, in_features", experts);
  out.lora.rank = a->size(a->dim() - 2);
  for (const int64_t size : {m, n, k}) area("lora_a", out.lora.rank, size);
  has_shape("lora_b", *b, {n, out.lora.rank}, "out_features, rank", experts);
  out.lora.a = operand("lora_a", *a, like_name, like, &out.a);
  out.lora.b = operand("lora_b", *b, like_name, like, &out.b);
  return out;
}

// Returns the number of rows of x [..., last], with its leading dimensions flattened. Over experts it has one.
inline int64_t rows_of(const char* name, const Tensor& x, int64_t* last, Experts experts = {}) {
  if (experts) has_shape(name, x, {kAnySize, kAnySize}, "rows, features");
  require(x.dim() >= 1, name, ": expected at least one dimension, got a scalar");
  *last = x.size(x.dim() - 1);
  Count count(name);
  for (int64_t i = 0; i + 1 < x.dim(); ++i) count.times(x.size(i));
  const int64_t rows = count.value();
  count.times(*last);
  return rows;
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

// Returns the shape of x with another last dimension. `name` is the argument that this dimension comes from.
inline std::vector<int64_t> with_last(const Tensor& x, const char* name, int64_t last) {
  Count count(name);
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
  shape.push_back(last);
  for (const int64_t size : shape) count.times(size);
  return shape;
}

// Allocates h [.., rank] for x [.., last], or g for dy, which the kernels fill. It is filled with zeros in an
// `empty_call`, where no kernel runs, and on the CPU for several adapters, of which some may have a smaller rank.
inline void* kept_low_rank(const Tensor& like, const OptionalTensor& lora_a, const Lora& lora, bool empty_call,
                           Tensor* keep) {
  require(lora_a.has_value(), "lora_a: expected a tensor, got None");
  *keep = empty(like, with_last(like, "lora_a", lora.rank), like.scalar_type());
  if (empty_call || (lora.adapters && like.is_cpu())) stable::zero_(*keep);
  return keep->mutable_data_ptr();
}

// Returns h or g as an operand for the m tokens of x, or null if it is not given.
inline const void* given_low_rank(const char* name, const OptionalTensor& t, int64_t rank, const Tensor& x, int64_t m,
                                  Tensor* keep) {
  if (!t) return nullptr;
  is_given(name, *t);
  int64_t last = 0;
  const int64_t rows = rows_of(name, *t, &last);
  require(rows == m && last == rank, name, ": expected ", m, " rows of ", rank, " elements (the rank), got shape ",
          shape_text(*t));
  return operand(name, *t, "x", x, keep);
}

// An operator's result: its output, and with kBoth also the retained h or g.
template <bool kBoth>
auto results(const Tensor& out, const Tensor& kept) {
  if constexpr (kBoth)
    return std::tuple(out, kept);
  else
    return out;
}

// Returns the shape of w's packed codes: [..., K/2], so that dim 0 can be sharded, or flat if the last dimension is
// odd.
inline std::vector<int64_t> packed_shape(const Tensor& w) {
  const int64_t dims = w.dim();
  if (dims >= 1 && w.size(dims - 1) % 2 == 0) return with_last(w, "w", w.size(dims - 1) / 2);
  return {packed_bytes(w.numel())};
}

}  // namespace qlora::checks
