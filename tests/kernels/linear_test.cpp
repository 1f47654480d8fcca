#include "tests/kernels/linear_test.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "cpp/cpu/check.h"
#include "cpp/cpu/shared/dropout.h"
#include "cpp/cpu/tuning.h"
#include "cpp/format/grouped.h"
#include "cpp/format/print_kernels.h"
#include "tests/kernels/accuracy.h"
#include "tests/kernels/int8.h"
#include "tests/kernels/numbers.h"
#include "tests/kernels/pools.h"
#include "tests/kernels/problems.h"

namespace kernels_test {
namespace {

using cpu::Kernels;
using cpu::KernelsFor;
using cpu::Outcome;

constexpr int64_t kRowsBefore = 5;  // of the first expert, if the problem is the second's
constexpr double kScaling = 0.5;

std::vector<float> dense_weights(const LinearShape& s, Random& random) {
  std::vector<float> w(s.n * s.k);
  for (float& x : w) x = static_cast<float>(random.normal() * 0.05);
  if (s.weights == Weights::kSparse) {
    for (float& x : w) x = random.bits() % 40 == 0 ? x : 0.0f;
  }
  for (int64_t row = 0; row < s.n; ++row) {
    const int64_t column = (row * 7 + 3) % s.k;
    if (s.weights == Weights::kOutliers) w[row * s.k + column] *= 1e5f;
    if (s.weights != Weights::kPermutation) continue;
    for (int64_t k = 0; k < s.k; ++k) w[row * s.k + k] = k == column ? 1.0f : 0.0f;
  }
  return w;
}

void set_code(uint8_t* packed, int64_t i, int bits, int code) {
  if (bits == 8) {
    packed[i] = static_cast<uint8_t>(code);
    return;
  }
  uint8_t* const unit = packed + i / kUnit * unit_bytes(bits);
  const int e = static_cast<int>(i % kUnit), per_byte = 8 / (bits - 4);
  unit[e / 2] = static_cast<uint8_t>(unit[e / 2] | (code & 15) << (e % 2 ? 0 : 4));
  uint8_t& upper = unit[kUnit / 2 + e / per_byte];
  upper = static_cast<uint8_t>(upper | code >> 4 << e % per_byte * (bits - 4));
}

// Rounds to the nearest values of a wide code. `packed` is zeros.
void quantize_wide(const WideCode& wide, float largest, const std::vector<float>& w, int64_t block_size,
                   uint8_t* packed, float* absmax) {
  for (size_t i = 0; i < w.size(); ++i) {
    float& scale = absmax[i / block_size];
    if (i % block_size == 0) {
      scale = 0.0f;
      for (size_t j = i; j < w.size() && j < i + block_size; ++j) scale = std::max(scale, std::abs(w[j]) / largest);
    }
    int best = 0;
    const auto distance = [&](int code) {
      const float of_code = std::abs(wide_value(wide, code) * scale - w[i]);
      return std::isfinite(of_code) ? of_code : INFINITY;
    };
    for (int code = 1; code < 1 << wide.bits; ++code) best = distance(code) < distance(best) ? code : best;
    set_code(packed, static_cast<int64_t>(i), wide.bits, best);
  }
}

// The mean of the least and the largest value.
float middle_of(Code code) {
  if (is_wide(code)) {
    const WideCode& wide = wide_code(code);
    return wide.kind == WideCode::Kind::kInteger ? static_cast<float>((1 << wide.bits) - 1) / 2 - wide.zero : 0.0f;
  }
  const CodeTable& table = table_of(code);
  return (table.ranked[0] + table.ranked[table.ranks - 1]) / 2;
}

// A stack of two packed weights. A problem has one of them. Offsets make the values of a block as often negative as
// positive.
class PackedWeights {
 public:
  PackedWeights(const LinearShape& s, Code code, bool has_offsets, Random& random) {
    const cpu::Kernels& plain = cpu::scalar_kernels();
    const int64_t numel = s.n * s.k, blocks = ceil_div(numel, s.block_size);
    const int64_t nested_blocks = ceil_div(blocks, kNestedBlockSize);
    const int64_t bytes = packed_bytes(numel, bits_of(code));
    packed_.resize(2 * bytes), absmax_.resize(2 * blocks), codes_.resize(2 * blocks);
    nested_absmax_.resize(2 * nested_blocks), nested_offset_.resize(2);
    for (int expert = 0; expert < 2; ++expert) {
      const std::vector<float> w = dense_weights(s, random);
      float* const absmax = absmax_.data() + expert * blocks;
      uint8_t* const packed = packed_.data() + expert * bytes;
      if (is_wide(code)) {
        quantize_wide(wide_code(code), largest_value(code), w, s.block_size, packed, absmax);
      } else {
        plain.codec->quantize_nf4(kOneThread, code, DType::kFloat32, w.data(), numel, s.block_size, packed, absmax);
      }
      plain.codec->quantize_absmax(kOneThread, absmax, blocks, kNestedBlockSize, codes_.data() + expert * blocks,
                                   nested_absmax_.data() + expert * nested_blocks, &nested_offset_[expert]);
    }
    weight_.n = s.n, weight_.k = s.k, weight_.packed = packed_.data();
    weight_.code = code;
    weight_.scales = s.double_quant ? nested_scales(codes_.data(), nested_absmax_.data(), nested_offset_.data(),
                                                    s.block_size, kNestedBlockSize)
                                    : float_scales(absmax_.data(), s.block_size);
    const WeightStride stride = weight_stride(weight_);
    if (has_offsets) {
      const float middle = middle_of(code);
      for (const float scale : absmax_) offsets_.push_back(static_cast<float>(0.3 * random.normal() - middle) * scale);
      weight_.scales.offsets = {OffsetForm::kFloat32, offsets_.data(), nullptr};
    }
    const int expert = s.second_expert;
    weight_.packed += expert * stride.packed_bytes;
    weight_.scales = expert_scales(weight_.scales, stride, expert);
  }
  PackedWeights(const PackedWeights&) = delete;

  const Weight& weight() const { return weight_; }
  Matrix decoded() const {
    std::vector<float> w(weight_.n * weight_.k);
    cpu::scalar_kernels().codec->dequantize_nf4(kOneThread, weight_, DType::kFloat32, w.data());
    Matrix m(weight_.n, weight_.k);
    for (size_t i = 0; i < w.size(); ++i) m.value[i] = w[i];
    return m;
  }

 private:
  static constexpr int64_t kNestedBlockSize = 16;
  std::vector<uint8_t> packed_, codes_;
  std::vector<float> absmax_, nested_absmax_, nested_offset_, offsets_;
  Weight weight_;
};

double magnitude(Inputs inputs, DType dtype) {
  const bool is_float16 = dtype == DType::kFloat16;
  return inputs == Inputs::kTiny   ? (is_float16 ? 1e-6 : 1e-37)
         : inputs == Inputs::kHuge ? (is_float16 ? 1e3 : 1e34)
                                   : 1;
}

Matrix inputs(const LinearShape& s, int64_t rows, int64_t columns, DType dtype, Random& random) {
  Matrix m(rows, columns);
  for (size_t i = 0; i < m.value.size(); ++i) {
    m.value[i] = random.normal() * magnitude(s.inputs, dtype);
    if (s.inputs == Inputs::kOutliers && random.bits() % 61 == 0) m.value[i] *= 1e4;
    m.value[i] = rounded(m.value[i], dtype);
  }
  return m;
}

Matrix factor(int64_t rows, int64_t columns, double size, DType dtype, Random& random) {
  Matrix m(rows, columns);
  for (double& x : m.value) x = rounded(random.normal() * size, dtype);
  return m;
}

class LinearTest {
 public:
  LinearTest(const Kernels& set, Report* report) : set_(set), report_(report) {}

  void run(const LinearShape& s, Code code, DType dtype, bool has_offsets = false) {
    Random random(static_cast<uint64_t>(s.m * 1000003 + s.n * 1009 + s.k));
    const PackedWeights weights(s, code, has_offsets, random);
    const int64_t m = s.m, n = s.n, k = s.k, r = s.rank;
    const double grow = s.inputs == Inputs::kNormal || s.inputs == Inputs::kOutliers ? 1 : magnitude(s.inputs, dtype);
    const Matrix x = inputs(s, m, k, dtype, random), dy = inputs(s, m, n, dtype, random);
    const Matrix a = factor(r, k, 1 / std::sqrt(static_cast<double>(k)), dtype, random);
    const Matrix b = factor(n, r, 0.2, dtype, random), bias = factor(1, n, grow, dtype, random);
    Lora lora;
    const Tensor a_tensor(dtype, a), b_tensor(dtype, b), bias_tensor(dtype, bias);
    lora.a = a_tensor.data(), lora.b = b_tensor.data(), lora.rank = r, lora.scaling = kScaling;
    lora.dropout = make_dropout(s.dropout, 77);
    lora.dropout.first = s.second_expert ? kRowsBefore * k : 0;
    Matrix mask(m, k), dropped_x = x;
    for (int64_t i = 0; i < m * k; ++i) {
      mask.value[i] = r && cpu::dropped(lora.dropout, i) ? 0 : lora.dropout.keep_scale;
      dropped_x.value[i] *= mask.value[i];
    }
    const Operand w = weight(weights.decoded(), dtype);
    const Operand h = as_operand(low_rank(dropped_x, transposed(a), kScaling, dtype));
    const Operand g = as_operand(low_rank(dy, b, kScaling, dtype));

    const Tensor x_tensor(dtype, x), dy_tensor(dtype, dy);
    LinearProblem forward;
    forward.dtype = dtype, forward.m = m, forward.x = x_tensor.data(), forward.w = weights.weight();
    forward.bias = s.bias ? bias_tensor.data() : nullptr, forward.lora = lora;
    if (has_kernels(set_.forward, dtype)) {
      std::vector<Product> products = {{given(x), transposed(w), {}}};
      if (r) products.push_back({h, given(transposed(b)), {}});
      check("linear_nf4", set_.forward, cpu::linear_nf4, forward,
            {{m, n, sums(products, s.bias ? bias.value : std::vector<double>{}, dtype)}, {m, r, expected(h)}},
            [](LinearProblem* p, std::vector<Tensor>& out) { p->y = out[0].data(), p->h = out[1].data(); });
    }

    if (set_.forward[cpu::Kernel::kManyTokensInt8] && cpu::has_int8_segments(forward.w)) {
      forward.activations = Activations::kInt8;
      const Int8Weight int8(forward.w, weights.decoded());
      std::vector<Product> products = {{given(Int8Rows(x).values()), given(transposed(int8.values())), {}}};
      if (r) products.push_back({h, given(transposed(b)), {}});
      check("linear_nf4 in int8", set_.forward, cpu::linear_nf4, forward,
            {{m, n, sums(products, s.bias ? bias.value : std::vector<double>{}, dtype)}, {m, r, expected(h)}},
            [](LinearProblem* p, std::vector<Tensor>& out) { p->y = out[0].data(), p->h = out[1].data(); });
    }

    LinearDxProblem dx;
    dx.dtype = dtype, dx.m = m, dx.dy = dy_tensor.data(), dx.w = weights.weight(), dx.lora = lora;
    if (has_kernels(set_.dx, dtype)) {
      std::vector<Product> products = {{given(dy), w, {}}};
      if (r) products.push_back({g, given(a), mask});
      check("linear_nf4_dx", set_.dx, cpu::linear_nf4_dx, dx, {{m, k, sums(products, {}, dtype)}, {m, r, expected(g)}},
            [](LinearDxProblem* p, std::vector<Tensor>& out) { p->dx = out[0].data(), p->g = out[1].data(); });
    }

    dx.activations = Activations::kInt8;
    if (set_.dx[cpu::Kernel::kManyTokensInt8] && accepts(cpu::Kernel::kManyTokensInt8, dx)) {
      std::vector<Product> products = int8_dx_products(dy, Int8Weight(dx.w, weights.decoded()), dx.w);
      if (r) products.push_back({g, given(a), mask});
      check("linear_nf4_dx in int8", set_.dx, cpu::linear_nf4_dx, dx,
            {{m, k, sums(products, {}, dtype)}, {m, r, expected(g)}},
            [](LinearDxProblem* p, std::vector<Tensor>& out) { p->dx = out[0].data(), p->g = out[1].data(); });
    }

    if (r == 0 || !has_kernels(set_.dlora, dtype)) return;
    LoraGradProblem dlora;
    dlora.dtype = dtype, dlora.m = m, dlora.n = n, dlora.k = k, dlora.x = x_tensor.data(), dlora.dy = dy_tensor.data();
    dlora.lora = lora;
    const auto set_out = [](LoraGradProblem* p, std::vector<Tensor>& out) {
      p->da = out[0].data(), p->db = out[1].data();
    };
    // A gradient multiplies two inputs, whose product is too large for float16.
    if (s.inputs == Inputs::kHuge || (s.inputs == Inputs::kOutliers && dtype == DType::kFloat16)) return;
    check("linear_nf4_dlora", set_.dlora, cpu::linear_nf4_dlora, dlora,
          {{r, k, sums({{transposed(g), given(dropped_x), {}}}, {}, dtype)},
           {n, r, sums({{given(transposed(dy)), h, {}}}, {}, dtype)}},
          set_out);
    const Matrix given_h = factor(m, r, 1, dtype, random), given_g = factor(m, r, 1, dtype, random);
    const Tensor h_tensor(dtype, given_h), g_tensor(dtype, given_g);
    dlora.h = h_tensor.data(), dlora.g = g_tensor.data();
    check("linear_nf4_dlora of given h and g", set_.dlora, cpu::linear_nf4_dlora, dlora,
          {{r, k, sums({{given(transposed(given_g)), given(dropped_x), {}}}, {}, dtype)},
           {n, r, sums({{given(transposed(dy)), given(given_h), {}}}, {}, dtype)}},
          set_out);
  }

  // A NaN or an infinity in x reaches its own token and no other.
  void run_non_finite(DType dtype) {
    const LinearShape s = {4, 40, 192, 4, 64, true, 0.0, true, false};
    Random random(5);
    const PackedWeights weights(s, Code::kNf4, false, random);
    Matrix x = inputs(s, s.m, s.k, dtype, random);
    x.at(1, 70) = NAN, x.at(3, 5) = INFINITY;
    const Matrix a = factor(s.rank, s.k, 0.1, dtype, random), b = factor(s.n, s.rank, 0.2, dtype, random);
    const Tensor x_tensor(dtype, x), a_tensor(dtype, a), b_tensor(dtype, b);
    LinearProblem p;
    p.dtype = dtype, p.m = s.m, p.x = x_tensor.data(), p.w = weights.weight();
    p.activations = Activations::kInt8;  // the exact kernels do not look at it
    p.lora.a = a_tensor.data(), p.lora.b = b_tensor.data(), p.lora.rank = s.rank;
    for (const cpu::KernelInfo& info : cpu::kKernelInfo) {
      const auto run = set_.forward[info.kernel];
      if (!run || !accepts(info.kernel, p)) continue;
      Tensor y(dtype, s.m, s.n);
      p.y = y.data();
      if (run(kOneThread, p) != Outcome::kDone) continue;
      const Matrix out = y.matrix();
      bool right = true;
      for (int64_t i = 0; i < s.m; ++i)
        for (int64_t j = 0; j < s.n; ++j) right &= std::isfinite(out.at(i, j)) == (i % 2 == 0);
      report_->check(right, std::string("NaN and infinity of linear_nf4 by ") + info.name + ", " + dtype_name(dtype));
    }
  }

  // In int8 every set has the same bits.
  void run_int8_bits() {
    const LinearShape s = {19, 130, 192, 0, 32, true, 0.0, false, false, Inputs::kOutliers};
    Random random(6);
    const PackedWeights weights(s, Code::kNf4, false, random);
    const Int8Weight w(weights.weight(), weights.decoded());
    const bool fused = set_.isa != &cpu::kScalarIsa;
    Matrix x = inputs(s, s.m, s.k, DType::kFloat32, random);
    const Matrix dy = inputs(s, s.m, s.n, DType::kFloat32, random);
    for (int i = 0; i < kInt8Segment; ++i) x.at(0, i) = i ? i - 20.5 : 127;  // halves of a unit, which go to even
    const Tensor x_tensor(DType::kFloat32, x), dy_tensor(DType::kFloat32, dy);
    LinearProblem forward;
    forward.dtype = DType::kFloat32, forward.m = s.m, forward.x = x_tensor.data(), forward.w = weights.weight();
    forward.activations = Activations::kInt8;
    LinearDxProblem dx;
    dx.dtype = DType::kFloat32, dx.m = s.m, dx.dy = dy_tensor.data(), dx.w = weights.weight();
    dx.activations = Activations::kInt8;
    const Tensor y_bits(DType::kFloat32, int8_forward_bits(x, w, fused));
    const Tensor dx_bits(DType::kFloat32, int8_dx_bits(dy, w, fused));
    for (const cpu::KernelInfo& info : cpu::kKernelInfo) {
      if (!rounds(info.kernel)) continue;
      Tensor y(DType::kFloat32, s.m, s.n), dx_out(DType::kFloat32, s.m, s.k);
      forward.y = y.data(), dx.dx = dx_out.data();
      if (const auto run = set_.forward[info.kernel])
        report_->check(run(kOneThread, forward) == Outcome::kDone && y == y_bits,
                       std::string("bits of y by ") + info.name);
      if (const auto run = set_.dx[info.kernel])
        report_->check(run(kOneThread, dx) == Outcome::kDone && dx_out == dx_bits,
                       std::string("bits of dx by ") + info.name);
    }
  }

  // The number of results of each kernel, by operator and name.
  const std::map<std::string, int>& served() const { return served_; }

 private:
  struct Output {
    int64_t rows, columns;
    Expected expected;
  };

  template <class Problem>
  static bool has_kernels(const KernelsFor<Problem>& kernels, DType dtype) {
    for (const cpu::KernelInfo& info : cpu::kKernelInfo)
      if (kernels[info.kernel] && info.types.has(dtype)) return true;
    return false;
  }

  // Whether a kernel rounds activations to int8, and whether the problem asks for it.
  static bool rounds(cpu::Kernel kernel) {
    return kernel == cpu::Kernel::kFewTokensInt8 || kernel == cpu::Kernel::kManyTokensInt8;
  }
  template <class Problem>
  static bool is_rounded(const Problem& p) {
    if constexpr (requires { p.activations; }) return p.activations == Activations::kInt8;
    return false;
  }

  static Expected expected(const Operand& o) { return {o.exact, o.formula, o.error, o.noise}; }

  template <class Problem>
  static std::string text(const Problem& p) {
    std::string code;
    if constexpr (requires { p.w; })
      code = std::string(" ") + (is_wide(p.w.code) ? wide_code(p.w.code).name : p.w.table().name) +
             (p.w.scales.offsets ? " with offsets" : "");
    return problem_text(p) + code;
  }

  template <class Problem, class SetOut>
  void check(const std::string& op, const KernelsFor<Problem>& kernels,
             cpu::Error (*chosen)(const cpu::Pool&, const Problem&), Problem p, const std::vector<Output>& outputs,
             const SetOut& set_out) {
    const auto attempt = [&](const std::string& name, const auto& run) {
      std::vector<Tensor> whole, pieces;
      for (const Output& o : outputs) {
        whole.emplace_back(p.dtype, o.rows, o.columns);
        pieces.emplace_back(p.dtype, o.rows, o.columns);
      }
      set_out(&p, whole);
      if (run(kOneThread) != Outcome::kDone) return false;
      set_out(&p, pieces);
      run(kPieces);
      const std::string what = op + " of " + text(p) + " by " + name;
      for (size_t i = 0; i < outputs.size(); ++i) {
        const std::string wrong = failure(whole[i].matrix(), outputs[i].expected);
        report_->check(wrong.empty(), what + ", output " + std::to_string(i) + ": " + wrong);
        report_->check(whole[i] == pieces[i], what + ": its bits depend on how the work is cut");
        report_->check(whole[i].intact() && pieces[i].intact(), what + " writes beyond its output");
      }
      ++served_[op + " by " + name];
      return true;
    };
    bool served = false;
    for (const cpu::KernelInfo& info : cpu::kKernelInfo) {
      const auto run = kernels[info.kernel];
      if (run && accepts(info.kernel, p) && rounds(info.kernel) == is_rounded(p))
        served |= attempt(info.name, [&](const cpu::Pool& pool) { return run(pool, p); });
    }
    if (is_rounded(p) && !served) return;  // the choice falls back to exact kernels
    attempt("choice", [&](const cpu::Pool& pool) {
      cpu::check(chosen(pool, p));
      return Outcome::kDone;
    });
  }

  const Kernels& set_;
  Report* report_;
  std::map<std::string, int> served_;
};

}  // namespace

void test_linear(const Kernels& set, Report* report) {
  LinearTest test(set, report);
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    int turn = 0;
    for (const LinearShape& s : kLinearShapes) {
      test.run(s, Code::kNf4, dtype);
      test.run(s, Code::kShuffled, dtype);
      test.run(s, static_cast<Code>(++turn % kCodeTableCount), dtype);
      // The offset of a block with an outlier is as large as the outlier, and sums of such weights exceed float16.
      if (dtype != DType::kFloat16 || s.weights != Weights::kOutliers)
        test.run(s, turn % 2 ? Code::kUint4 : Code::kNf4, dtype, true);
      // Rows of wide codes are whole blocks and units.
      if (s.k % std::max<int64_t>(s.block_size, kUnit) == 0) {
        const bool has_offsets = turn % 3 == 0 && s.weights == Weights::kNormal;
        for (int i = 0; i < 2; ++i)
          test.run(s, static_cast<Code>(kFirstWideCode + (2 * turn + i) % kWideCodeCount), dtype, has_offsets);
      }
    }
    test.run_non_finite(dtype);
  }
  test.run_int8_bits();
  for (const auto& [name, count] : test.served()) std::printf("  %s: %d problems\n", name.c_str(), count);
}

}  // namespace kernels_test
