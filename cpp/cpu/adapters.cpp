#include "cpp/cpu/adapters.h"

#include <cstring>
#include <vector>

#include "cpp/cpu/shared/dropout.h"
#include "cpp/format/dtypes.h"

namespace qlora::cpu {
namespace {

using Bytes = std::vector<char>;

const void* at(const void* p, int64_t bytes) { return p ? static_cast<const char*>(p) + bytes : nullptr; }
void* at(void* p, int64_t bytes) { return p ? static_cast<char*>(p) + bytes : nullptr; }

// Copies `rows` rows of `bytes` bytes.
void copy_rows(const void* from, int64_t from_stride, int64_t rows, int64_t bytes, void* to, int64_t to_stride) {
  for (int64_t i = 0; bytes && i < rows; ++i)
    std::memcpy(at(to, i * to_stride), at(from, i * from_stride), static_cast<size_t>(bytes));
}

// An adapter as kernels of one adapter take it: its b, a part of the stack's columns, is copied to `b`.
Lora with_dense_b(Lora lora, int64_t n, int64_t element, Bytes* b) {
  const int64_t row_bytes = lora.rank * element;
  b->resize(static_cast<size_t>(n * row_bytes));
  copy_rows(lora.b, lora.b_stride * element, n, row_bytes, b->data(), row_bytes);
  lora.b = b->data();
  lora.b_stride = 0;
  return lora;
}

// The tokens of each adapter in ascending order. The last list has those without an adapter.
std::vector<std::vector<int64_t>> tokens_by_adapter(const Adapters& adapters, int64_t m) {
  std::vector<std::vector<int64_t>> tokens(static_cast<size_t>(adapters.count) + 1);
  for (int64_t i = 0; i < m; ++i) {
    const int64_t adapter = adapters.of_token[i];
    tokens[static_cast<size_t>(adapter < 0 ? adapters.count : adapter)].push_back(i);
  }
  return tokens;
}

// Calls run_all(lora, out, low_rank) for each adapter that some token uses, and copies that token's rows. `out` is
// [m, width], `low_rank` the retained h or g.
template <class RunAll>
void take_rows(const Lora& stack, int64_t m, int64_t n, int64_t element, void* out, int64_t width, void* low_rank,
               const RunAll& run_all) {
  const auto tokens = tokens_by_adapter(*stack.adapters, m);
  Bytes b, outputs(static_cast<size_t>(m * width * element)), low_ranks;
  for (int64_t e = 0; e <= stack.adapters->count; ++e) {
    const auto& of_adapter = tokens[static_cast<size_t>(e)];
    if (of_adapter.empty()) continue;
    const Lora lora = e < stack.adapters->count ? with_dense_b(stack.adapters->each[e], n, element, &b) : Lora{};
    const int64_t bytes = width * element, low_bytes = lora.rank * element;
    low_ranks.resize(static_cast<size_t>(low_rank ? m * low_bytes : 0));
    run_all(lora, outputs.data(), low_ranks.empty() ? nullptr : low_ranks.data());
    for (const int64_t i : of_adapter) {
      copy_rows(outputs.data() + i * bytes, 0, 1, bytes, at(out, i * bytes), 0);
      if (low_rank)
        copy_rows(low_ranks.data() + i * low_bytes, 0, 1, low_bytes, at(low_rank, i * stack.rank * element), 0);
    }
  }
}

// A matrix [tokens, columns] of the tokens' rows, whose rows in `in` are `stride` elements long. Consecutive tokens
// need no copy.
const void* rows_of(const void* in, int64_t stride, int64_t columns, const std::vector<int64_t>& tokens, bool in_place,
                    int64_t element, Bytes* memory) {
  if (!in || tokens.empty()) return in;
  if (in_place && stride == columns) return at(in, tokens[0] * stride * element);
  const int64_t bytes = columns * element;
  memory->resize(tokens.size() * static_cast<size_t>(bytes));
  for (size_t i = 0; i < tokens.size(); ++i)
    copy_rows(at(in, tokens[i] * stride * element), 0, 1, bytes, memory->data() + static_cast<int64_t>(i) * bytes, 0);
  return memory->data();
}

// Clears the elements of the copied rows that dropout drops.
void drop(const Pool& pool, const Dropout& dropout, const std::vector<int64_t>& tokens, int64_t columns,
          int64_t element, char* rows) {
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t c = 0; c < columns; ++c) {
        if (dropped(dropout, tokens[static_cast<size_t>(i)] * columns + c))
          std::memset(rows + (i * columns + c) * element, 0, static_cast<size_t>(element));
      }
    }
  };
  pool(static_cast<int64_t>(tokens.size()), 1, body);
}

}  // namespace

void run_per_adapter(const LinearProblem& p, const RunProblem<LinearProblem>& run) {
  take_rows(p.lora, p.m, p.w.n, dtype_bytes(p.dtype), p.y, p.w.n, p.h, [&](const Lora& lora, void* y, void* h) {
    LinearProblem one = p;
    one.lora = lora, one.y = y, one.h = h;
    run(one);
  });
}

void run_per_adapter(const LinearDxProblem& p, const RunProblem<LinearDxProblem>& run) {
  take_rows(p.lora, p.m, p.w.n, dtype_bytes(p.dtype), p.dx, p.w.k, p.g, [&](const Lora& lora, void* dx, void* g) {
    LinearDxProblem one = p;
    one.lora = lora, one.dx = dx, one.g = g;
    run(one);
  });
}

void run_per_adapter(const Pool& pool, const LoraGradProblem& p, const RunProblem<LoraGradProblem>& run) {
  const Adapters& adapters = *p.lora.adapters;
  const int64_t element = dtype_bytes(p.dtype);
  const auto tokens = tokens_by_adapter(adapters, p.m);
  Bytes x, dy, h, g, b, db;
  int64_t first_rank = 0;
  for (int64_t e = 0; e < adapters.count; ++e) {
    const auto& mine = tokens[static_cast<size_t>(e)];
    const int64_t count = static_cast<int64_t>(mine.size());
    const bool in_place = count == 0 || mine.back() - mine.front() + 1 == count;
    LoraGradProblem one = p;
    one.lora = with_dense_b(adapters.each[e], p.n, element, &b);
    const int64_t rank = one.lora.rank;
    one.m = count;
    one.x = rows_of(p.x, p.k, p.k, mine, in_place, element, &x);
    one.dy = rows_of(p.dy, p.n, p.n, mine, in_place, element, &dy);
    one.h = rows_of(p.h, p.lora.rank, rank, mine, in_place, element, &h);
    one.g = rows_of(p.g, p.lora.rank, rank, mine, in_place, element, &g);
    if (!in_place && one.lora.dropout.active()) {
      drop(pool, one.lora.dropout, mine, p.k, element, x.data());
      one.lora.dropout.threshold = 0;  // the sums are still multiplied by keep_scale
    } else if (count) {
      one.lora.dropout.first += mine[0] * p.k;
    }
    db.resize(static_cast<size_t>(p.n * rank * element));
    one.da = at(p.da, first_rank * p.k * element);
    one.db = db.data();
    if (rank) run(one);
    copy_rows(db.data(), rank * element, p.n, rank * element, at(p.db, first_rank * element),
              adapters.stack_rank * element);
    first_rank += rank;
  }
}

}  // namespace qlora::cpu
