// Checks the arguments of calls whose rows use different adapters, and divides the stacks lora_a and lora_b.
#pragma once

#include <algorithm>
#include <vector>

#include "cpp/ops/checks.h"

namespace qlora::checks {

// Checks a tensor [count] that is on the device of x, and returns its contiguous data.
template <class T>
const T* numbers(const char* name, const Tensor& t, ScalarType dtype, int64_t count, const char* names, Tensor* keep) {
  has_dtype(name, t, dtype);
  has_shape(name, t, {count}, names);
  *keep = t.is_contiguous() ? t : stable::contiguous(t);
  return keep->const_data_ptr<T>();
}

// The first rank of each adapter in the stacks, and their sum.
inline std::vector<int64_t> rank_offsets(const Tensor& t, int64_t stack_rank, int64_t max_rank) {
  require(t.dim() == 1 && t.size(0) >= 1, "rank_offsets: expected shape [adapters + 1], got ", shape_text(t));
  Tensor keep;
  const int64_t count = t.size(0);
  const int32_t* const at =
      numbers<int32_t>("rank_offsets", t, ScalarType::Int, count, "one per adapter, and their sum", &keep);
  require(at[0] == 0, "rank_offsets: expected 0 first, got ", at[0]);
  int64_t largest = 0;
  for (int64_t e = 0; e + 1 < count; ++e) {
    require(at[e] <= at[e + 1], "rank_offsets: expected ascending numbers, got ", at[e + 1], " after ", at[e]);
    largest = std::max<int64_t>(largest, at[e + 1] - at[e]);
  }
  require(at[count - 1] == stack_rank, "rank_offsets: expected ", stack_rank,
          " last (the rows of lora_a and the columns of lora_b), got ", at[count - 1]);
  require(max_rank == largest, "max_rank: expected ", largest, " (the largest rank of rank_offsets), got ", max_rank);
  return {at, at + count};
}

inline std::vector<double> scalings(const Tensor& t, int64_t count) {
  Tensor keep;
  std::vector<double> out;
  if (t.scalar_type() == ScalarType::Float) {
    const float* const at = numbers<float>("scalings", t, ScalarType::Float, count, "one per adapter", &keep);
    out.assign(at, at + count);
  } else {
    const double* const at = numbers<double>("scalings", t, ScalarType::Double, count, "one per adapter", &keep);
    out.assign(at, at + count);
  }
  for (const double number : out)
    require(std::abs(number) <= std::numeric_limits<float>::max(),
            "scalings: expected finite numbers within float32's range, got ", number);
  return out;
}

// The same on CUDA, where the host checks types and sizes alone: it would have to wait for the numbers. Kernels neither
// read nor write out of bounds, whatever these are (cuda/tile/generic/adapters.cuh).
inline void device_adapters(const AdapterArgs& args, int64_t m, const char* like_name, const Tensor& like,
                            Experts experts, LoraOperands* operands) {
  Lora& stack = operands->lora;
  const Tensor& offsets = *args.rank_offsets;
  require(offsets.dim() == 1 && offsets.size(0) >= 1, "rank_offsets: expected shape [adapters + 1], got ",
          shape_text(offsets));
  const int64_t count = offsets.size(0) - 1;
  const int64_t groups = count * experts.value_or(1);
  require(groups < (int64_t{1} << 16), "rank_offsets: expected fewer than 65536 adapters (times experts) on CUDA, got ",
          groups);
  // Kernels see a stack in which each adapter has max_rank ranks, rounded up to a multiple of 32 at most.
  constexpr int64_t kMostRanks = int64_t{1} << 30;
  const int64_t most = count > 0 ? std::min(stack.rank, kMostRanks / count - 31) : 0;
  require(0 <= args.max_rank && args.max_rank <= most, "max_rank: expected 0 to ", most, " for ", count,
          " adapters with ranks of ", stack.rank, " in total, got ", args.max_rank);
  require(args.max_rank * count >= stack.rank, "max_rank: expected the largest rank of ", count,
          " adapters with ranks of ", stack.rank, " in total, got ", args.max_rank);
  area("max_rank", count * (args.max_rank + 31), m);
  for (const int64_t size : {operands->a.size(operands->a.dim() - 1), operands->b.size(operands->b.dim() - 2)})
    area("max_rank", groups * (args.max_rank + 31), size);

  auto own = std::make_unique<DeviceAdapters>();
  own->count = count;
  own->stack_rank = stack.rank;
  own->of_token =
      numbers<int32_t>("adapter_of_row", *args.of_row, ScalarType::Int, m, "one per row", &operands->adapter_of_row);
  own->rank_offsets = numbers<int32_t>("rank_offsets", offsets, ScalarType::Int, count + 1,
                                       "one per adapter, and their sum", &operands->rank_offsets);
  if (args.scalings->scalar_type() == ScalarType::Float)
    own->scalings =
        numbers<float>("scalings", *args.scalings, ScalarType::Float, count, "one per adapter", &operands->scalings);
  else
    own->scalings64 =
        numbers<double>("scalings", *args.scalings, ScalarType::Double, count, "one per adapter", &operands->scalings);
  if (args.seeds) {
    same_device("seeds", *args.seeds, like_name, like);
    own->seeds = numbers<int64_t>("seeds", *args.seeds, ScalarType::Long, count, "one per adapter", &operands->seeds);
  }
  operands->device_adapters = std::move(own);
  stack.adapters = operands->device_adapters.get();
  stack.rank = args.max_rank;
}

// Makes `operands`, whose a and b have been checked as those of one adapter, the operands of several. Does nothing if
// the call has one adapter. Over experts, the adapters get their parts of the first expert's a and b.
inline void adapters(const AdapterArgs& args, const LoraNumbers& lora, int64_t m, int64_t k, const char* like_name,
                     const Tensor& like, Experts experts, LoraOperands* operands) {
  if (!args.of_row) {
    require(!args.rank_offsets, "rank_offsets: expected None without adapter_of_row, got a tensor");
    require(!args.scalings, "scalings: expected None without adapter_of_row, got a tensor");
    require(!args.seeds, "seeds: expected None without adapter_of_row, got a tensor");
    require(args.max_rank == 0, "max_rank: expected 0 without adapter_of_row, got ", args.max_rank);
    return;
  }
  require(operands->a.defined(), "lora_a: expected a tensor with adapter_of_row, got None");
  require(args.rank_offsets.has_value(), "rank_offsets: expected a tensor with adapter_of_row, got None");
  require(args.scalings.has_value(), "scalings: expected a tensor with adapter_of_row, got None");
  require(lora.scaling == 1.0, "scaling: expected 1.0 with scalings, got ", lora.scaling);
  require(!args.seeds || !lora.seed_tensor, "seed_tensor: expected None with seeds, got a tensor");
  same_device("adapter_of_row", *args.of_row, like_name, like);
  same_device("rank_offsets", *args.rank_offsets, like_name, like);
  same_device("scalings", *args.scalings, like_name, like);

  if (!like.is_cpu()) return device_adapters(args, m, like_name, like, experts, operands);
  Lora& stack = operands->lora;
  const std::vector<int64_t> first = rank_offsets(*args.rank_offsets, stack.rank, args.max_rank);
  const int64_t count = static_cast<int64_t>(first.size()) - 1;
  const std::vector<double> scaling = scalings(*args.scalings, count);
  const int64_t* seeds = nullptr;
  Tensor keeps_seeds;
  if (args.seeds) {
    same_device("seeds", *args.seeds, like_name, like);
    seeds = numbers<int64_t>("seeds", *args.seeds, ScalarType::Long, count, "one per adapter", &keeps_seeds);
  }
  const int32_t* const of_row =
      numbers<int32_t>("adapter_of_row", *args.of_row, ScalarType::Int, m, "one per row", &operands->adapter_of_row);
  for (int64_t i = 0; i < m; ++i)
    require(-1 <= of_row[i] && of_row[i] < count, "adapter_of_row: expected -1 (none) to ", count - 1, ", got ",
            of_row[i], " for row ", i);

  const int64_t bytes = static_cast<int64_t>(like.element_size());
  const auto at = [&](const void* p, int64_t elements) -> const void* {
    return p ? static_cast<const char*>(p) + elements * bytes : nullptr;
  };
  for (int64_t e = 0; e < count; ++e) {
    Lora one = stack;
    one.rank = first[e + 1] - first[e];
    one.a = at(stack.a, first[e] * k);
    one.b = at(stack.b, first[e]);
    one.b_stride = stack.rank;
    one.scaling = scaling[e];
    if (seeds) one.dropout.seed = static_cast<uint64_t>(seeds[e]);
    operands->each.push_back(one);
  }
  operands->adapters = std::make_unique<Adapters>(Adapters{operands->each.data(), count, of_row, stack.rank});
  stack.adapters = operands->adapters.get();
  stack.rank = args.max_rank;
}

}  // namespace qlora::checks
