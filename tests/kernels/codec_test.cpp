#include "tests/kernels/codec_test.h"

#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "cpp/format/grouped.h"
#include "cpp/format/print_kernels.h"
#include "tests/kernels/numbers.h"
#include "tests/kernels/pools.h"
#include "tests/kernels/problems.h"

namespace kernels_test {
namespace {

using cpu::Kernels;
using Bytes = std::vector<uint8_t>;

constexpr int64_t kMostSearched = 5000;  // weights; a search encodes each about seventy times
constexpr DType kTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

template <class T>
Bytes bytes_of(const std::vector<T>& values) {
  const auto* first = reinterpret_cast<const uint8_t*>(values.data());
  return Bytes(first, first + values.size() * sizeof(T));
}

enum class Values { kNormal, kWide, kAtBoundaries, kWithNonFinite };

// Weights that are ordinary; of magnitudes all over the type's range, with blocks of zeros; on the codes' decision
// boundaries and next to them; or with a NaN, a signalling NaN and infinities among them.
Tensor weights(const CodecShape& s, Code code, DType dtype, Values values, Random& random) {
  const CodeTable& table = table_of(code);
  Matrix w(s.rows, s.columns);
  for (size_t i = 0; i < w.value.size(); ++i) {
    double& x = w.value[i];
    const bool zero_block = i / static_cast<size_t>(s.block_size) % 3 == 1;
    if (values == Values::kWide) {
      x = zero_block ? 0 : random.normal() * std::exp2(80 * random.uniform() * (dtype == DType::kFloat16 ? -0.2 : -1));
    } else if (values == Values::kAtBoundaries) {
      const auto boundary = random.bits() % static_cast<uint64_t>(table.ranks - 1);
      float at = i % static_cast<size_t>(s.block_size) ? table.boundary[boundary] : table.largest;
      if (i % 3) at = std::nextafter(at, i % 3 == 1 ? -9.0f : 9.0f);
      x = at * 0.5;  // whose scale divides without rounding
    } else {
      x = random.normal() * 0.05;
    }
    if (values == Values::kWithNonFinite && random.bits() % 97 == 0) {
      const double strange[] = {INFINITY, -INFINITY, NAN, std::numeric_limits<float>::signaling_NaN()};
      x = strange[random.bits() % 4];
    }
  }
  return Tensor(dtype, w);
}

// All outputs of a set's codec for a weight, one after another.
Bytes everything(const Kernels& set, const cpu::Pool& pool, const CodecShape& s, Code code, DType dtype,
                 const Tensor& w, const std::vector<float>& importance, const std::vector<float>& feedback) {
  const int64_t numel = s.rows * s.columns, blocks = ceil_div(numel, s.block_size);
  const int64_t nested_blocks = ceil_div(blocks, s.nested_block_size);
  Bytes all;
  const auto keep = [&all](const auto& values) {
    const Bytes some = bytes_of(values);
    all.insert(all.end(), some.begin(), some.end());
  };
  Bytes packed(packed_bytes(numel));
  std::vector<float> absmax(blocks), searched(blocks), decoded_absmax(blocks), nested_absmax(nested_blocks);
  Bytes codes(blocks);
  float nested_offset = 0;
  set.codec->quantize_nf4(pool, code, dtype, w.data(), numel, s.block_size, packed.data(), absmax.data());
  keep(packed), keep(absmax);
  set.codec->quantize_absmax(pool, absmax.data(), blocks, s.nested_block_size, codes.data(), nested_absmax.data(),
                             &nested_offset);
  keep(codes), keep(nested_absmax), keep(std::vector<float>{nested_offset});
  const Scales plain = float_scales(absmax.data(), s.block_size);
  const Scales nested =
      nested_scales(codes.data(), nested_absmax.data(), &nested_offset, s.block_size, s.nested_block_size);
  set.codec->dequantize_absmax(pool, nested, blocks, decoded_absmax.data());
  keep(decoded_absmax);
  std::vector<float> offsets(blocks);
  for (int64_t b = 0; b < blocks; ++b) offsets[b] = 0.25f * static_cast<float>(b % 9 - 4) - 1e-3f;
  Scales plain_with_offsets = plain, nested_with_offsets = nested;
  plain_with_offsets.offsets = nested_with_offsets.offsets = {OffsetForm::kFloat32, offsets.data(), nullptr};
  for (const DType to : kTypes) {
    for (const Scales& scales : {plain, nested, plain_with_offsets, nested_with_offsets}) {
      Bytes out(numel * dtype_bytes(to));
      set.codec->dequantize_nf4(pool, {packed.data(), code, scales, s.rows, s.columns}, to, out.data());
      keep(out);
    }
  }
  if (numel <= kMostSearched) {
    set.codec->search_absmax_nf4(pool, code, dtype, w.data(), importance.data(), numel, s.columns, s.block_size,
                                 searched.data());
    keep(searched);
  }
  // Scales that do not belong to these values: of either sign, and zeros.
  std::vector<float> scales = decoded_absmax;
  for (int64_t b = 0; b < blocks; ++b) scales[b] *= b % 5 == 3 ? -1.0f : b % 5 == 4 ? 0.0f : 1.0f;
  set.codec->encode_nf4(pool, code, dtype, w.data(), scales.data(), numel, s.block_size, packed.data());
  keep(packed);
  set.codec->encode_nf4_stochastic(pool, code, dtype, w.data(), scales.data(), numel, s.block_size, 1234,
                                   packed.data());
  keep(packed);
  constexpr int64_t kRank = 3;
  std::vector<float> a(kRank * s.columns), b(s.rows * kRank);
  for (size_t i = 0; i < a.size(); ++i) a[i] = 0.01f * static_cast<float>(i * 37 % 29) - 0.14f;
  for (size_t i = 0; i < b.size(); ++i) b[i] = 0.02f * static_cast<float>(i * 23 % 31) - 0.3f;
  std::vector<uint8_t> zero_points(blocks);
  for (int64_t i = 0; i < blocks; ++i) zero_points[i] = static_cast<uint8_t>(i * 7 % 16);
  Scales with_zero_points = plain;
  with_zero_points.offsets = {OffsetForm::kZeroPoint8, zero_points.data(), nullptr};
  Bytes merged(packed_bytes(numel));
  for (const Scales& of : {float_scales(scales.data(), s.block_size), nested_with_offsets, with_zero_points}) {
    set.codec->merge_lora_nf4(pool, {{packed.data(), code, of, s.rows, s.columns},
                                     a.data(),
                                     b.data(),
                                     kRank,
                                     0.5f,
                                     uint64_t{1} << 33 | 5,
                                     merged.data()});
    keep(merged);
  }
  if (!feedback.empty()) {
    std::vector<int64_t> order(s.columns);
    std::iota(order.rbegin(), order.rend(), 0);
    set.codec->encode_nf4_with_feedback(pool, code, dtype, w.data(), scales.data(), s.rows, s.columns, s.block_size,
                                        feedback.data(), order.data(), packed.data());
    keep(packed);
  }
  return all;
}

void test_codec(const Kernels& set, const CodecShape& s, Code code, DType dtype, const std::vector<float>& importance,
                const std::vector<float>& feedback, Random& random, Report* report) {
  for (const Values values : {Values::kNormal, Values::kWide, Values::kAtBoundaries, Values::kWithNonFinite}) {
    const Tensor w = weights(s, code, dtype, values, random);
    const Bytes plain = everything(cpu::scalar_kernels(), kOneThread, s, code, dtype, w, importance, feedback);
    const std::string what = std::string("codec of ") + table_of(code).name + ", " + std::to_string(s.rows) + " x " +
                             std::to_string(s.columns) + " " + dtype_name(dtype) + " in blocks of " +
                             std::to_string(s.block_size) + ", values " + std::to_string(static_cast<int>(values));
    report->check(everything(set, kOneThread, s, code, dtype, w, importance, feedback) == plain, what);
    report->check(everything(set, kPieces, s, code, dtype, w, importance, feedback) == plain, what + ", in pieces");
  }
}

// Offsets against plain arithmetic, in each type.
void test_offsets(const Kernels& set, Code code, Report* report) {
  constexpr int64_t kBlockSize = 32, kRows = 7, kColumns = 75, kBlocks = (kRows * kColumns + 31) / 32;
  Random random(3);
  Bytes packed(packed_bytes(kRows * kColumns));
  for (uint8_t& byte : packed) byte = static_cast<uint8_t>(random.bits());
  std::vector<float> absmax(kBlocks), offsets(kBlocks);
  for (float& x : absmax) x = static_cast<float>(random.uniform());
  for (float& x : offsets) x = static_cast<float>(random.normal());
  Weight w = {packed.data(), code, float_scales(absmax.data(), kBlockSize), kRows, kColumns};
  w.scales.offsets = {OffsetForm::kFloat32, offsets.data(), nullptr};
  std::vector<float> expected(kRows * kColumns);
  for (int64_t i = 0; i < kRows * kColumns; ++i) {
    const float product = w.table().value[code_at(packed.data(), i)] * absmax[i / kBlockSize];
    expected[i] = product + offsets[i / kBlockSize];
  }
  for (const DType to : kTypes) {
    Bytes out(expected.size() * dtype_bytes(to)), rounded(out.size());
    for (size_t i = 0; i < expected.size(); ++i) {
      if (to == DType::kFloat32) from_float(expected[i], reinterpret_cast<float*>(rounded.data()) + i);
      if (to == DType::kBFloat16) from_float(expected[i], reinterpret_cast<bfloat16*>(rounded.data()) + i);
      if (to == DType::kFloat16) from_float(expected[i], reinterpret_cast<float16*>(rounded.data()) + i);
    }
    set.codec->dequantize_nf4(kOneThread, w, to, out.data());
    report->check(out == rounded, std::string("offsets of ") + w.table().name + " to " + dtype_name(to));
  }
  const WeightStride stride = weight_stride(w);
  report->check(expert_scales(w.scales, stride, 2).offsets.stored == offsets.data() + 2 * kBlocks,
                "the offsets of a stack's third weight");
}

}  // namespace

void test_codec(const Kernels& set, Report* report) {
  Random random(1);
  for (int code = 0; code < kCodeTableCount; ++code) test_offsets(set, static_cast<Code>(code), report);
  for (const CodecShape& s : kCodecShapes) {
    std::vector<float> importance(s.columns), feedback;
    for (float& x : importance) x = static_cast<float>(random.uniform());
    if (s.columns <= 400) {
      feedback.resize(s.columns * s.columns);
      for (int64_t i = 0; i < s.columns; ++i)
        for (int64_t j = i; j < s.columns; ++j)
          feedback[i * s.columns + j] = static_cast<float>(i == j ? 1 + random.uniform() : 0.1 * random.normal());
    }
    for (int code = 0; code < kCodeTableCount; ++code)
      for (const DType dtype : kTypes)
        test_codec(set, s, static_cast<Code>(code), dtype, importance, feedback, random, report);
  }
}

}  // namespace kernels_test
