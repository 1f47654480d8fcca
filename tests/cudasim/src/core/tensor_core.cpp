// tcgen05.mma and tcgen05.commit: products of matrices in shared and tensor memory, and when they complete.
#include <algorithm>

#include "access.h"
#include "async.h"
#include "card_sum.h"
#include "select.h"
#include "shadow.h"
#include "shared_matrix.h"
#include "tensor_memory.h"

namespace cudasim {

namespace {

constexpr uint32_t kK = 16;  // of kind::f16

// What the instruction descriptor of kind::f16 says.
struct Product {
  Ty a, b, d;
  bool negate_a, negate_b, mn_major_a, mn_major_b;
  uint32_t m, n;     // of the CTA or the pair
  uint32_t rows;     // of each CTA
  bool two_by_two;   // lanes 64.. hold the right half of the columns
  uint32_t columns;  // of each CTA's D
  // Row r lies in lane lane_of(r), past the address's.
  uint32_t lane_of(uint32_t r) const { return m == 64 ? r % 16 + r / 16 * 32 : r; }
};
Product product_of(const PendingTensorWork& p) {
  const uint32_t d = p.descriptor;
  const auto type = [](uint32_t t) { return t == 0 ? Ty::f16 : Ty::bf16; };
  Product x;
  x.a = type(d >> 7 & 7);
  x.b = type(d >> 10 & 7);
  x.d = (d >> 4 & 3) == 0 ? Ty::f16 : Ty::f32;
  x.negate_a = d >> 13 & 1;
  x.negate_b = d >> 14 & 1;
  x.mn_major_a = d >> 15 & 1;
  x.mn_major_b = d >> 16 & 1;
  x.n = (d >> 17 & 63) * 8;
  x.m = (d >> 24 & 31) * 16;
  x.rows = x.m / p.pair;
  x.two_by_two = p.pair == 2 && x.m == 128;
  x.columns = x.two_by_two ? x.n / 2 : x.n;
  return x;
}
void check_descriptor(const PendingTensorWork& p, int lane) {
  const uint32_t d = p.descriptor;
  const auto bad = [&](const std::string& why) {
    fault(Fault::tensor_memory, lane, "instruction descriptor " + hex(d) + " of tcgen05.mma: " + why);
  };
  if (d & 4) fault(Fault::unsupported_instruction, lane, "sparse tcgen05.mma is not simulated");
  if (d & 0xe080004b) bad("a reserved bit is set");
  if ((d >> 4 & 3) > 1) bad("kind::f16 has D of float16 (0) or float32 (1)");
  if ((d >> 7 & 7) > 1 || (d >> 10 & 7) > 1) bad("kind::f16 has A and B of float16 (0) or bfloat16 (1)");
  const Product x = product_of(p);
  if (x.rows != 128 && x.rows != 64) bad("M is " + std::to_string(x.m));
  const uint32_t step = p.pair == 2 ? 32 : x.m == 64 ? 8 : 16;
  if (x.n < step || x.n > 256 || x.n % (p.pair == 2 && !p.a_in_tensor_memory ? 16 : step))
    bad("N is " + std::to_string(x.n));
  if (p.a_in_tensor_memory && x.mn_major_a) bad("A in tensor memory cannot be transposed");
  if (p.a_in_tensor_memory && x.two_by_two)
    fault(Fault::unsupported_instruction, lane, "A in tensor memory is not simulated for a pair with M = 128");
}

MatrixDescriptor matrix(const Warp& w, uint64_t d, bool mn_major, int lane) {
  static const uint32_t modes[] = {0, 4, 3, 4, 2, 4, 1, 4};
  if ((d >> 46 & 7) != 1)
    fault(Fault::tensor_memory, lane, "matrix descriptor " + hex(d) + " of tcgen05.mma: bits 46 to 48 have to be 1");
  const uint32_t mode = modes[d >> 61];
  if (mode == 4 || d >> 52 & 0x1ff)
    fault(Fault::unsupported_instruction, lane,
          "matrix descriptor " + hex(d) +
              " of tcgen05.mma: only relative strides, without swizzling and with that of 32, 64 and 128 bytes, are "
              "simulated");
  const MatrixDescriptor m(d, mode);
  if (!mn_major) check_mask(w, m, "tcgen05");
  return m;
}

// The lanes and columns of D or A in each CTA.
template <class F>
void each_area(const Product& x, uint32_t address, uint32_t columns, F f) {
  const uint32_t lane = address >> 16, column = address & 0xffff;
  if (x.m != 64) return f(TensorArea{lane, 128, column, columns});
  for (uint32_t i = 0; i < 4; ++i) f(TensorArea{lane + 32 * i, 16, column, columns});
}

template <class G>
void load_operands(const PendingTensorWork& p, const Product& x, Group& g, G granule, std::vector<float>& B,
                   std::vector<float>* A) {
  B.resize(size_t(x.n) * kK);
  for (uint32_t i = 0; i < p.pair; ++i) {
    Block& b = *g.blocks[p.first + i];
    const auto at = [&](uint32_t addr) { return granule(b, addr); };
    load_rows(matrix(*p.warp, p.b, x.mn_major_b, int(p.lane)), x.mn_major_b, x.b, 0, x.n / p.pair, at,
              B.data() + i * x.n / p.pair * kK);
    A[i].resize(size_t(x.rows) * kK);
    if (!p.a_in_tensor_memory)
      load_groups(matrix(*p.warp, p.a, x.mn_major_a, int(p.lane)), x.mn_major_a, x.a, x.rows, at, A[i].data());
  }
}

// A[i] of CTA i from tensor memory: each column holds two elements of a row.
void load_from_tensor_memory(const PendingTensorWork& p, const Product& x, const Block& b, std::vector<float>& A) {
  const uint32_t lane = uint32_t(p.a) >> 16, column = uint32_t(p.a) & 0xffff;
  for (uint32_t r = 0; r < x.rows; ++r)
    for (uint32_t k = 0; k < kK; k += 2) {
      float two[2];
      unpack_floats(b.tensor_memory->read(lane + x.lane_of(r), column + k / 2), x.a, two);
      for (uint32_t i = 0; i < 2; ++i) A[(r / 8 * kK + k + i) * 8 + r % 8] = two[i];
    }
}

// D[rows][n] (+)= A[rows][K] * B[n][K] for 8 rows and up to 16 columns at a time.
void multiply(const PendingTensorWork& p, const Product& x, TensorMemory& t, const uint32_t* disabled, const float* A,
              const float* B, bool card_sums, const CardSum& card) {
  const uint32_t lane0 = p.d >> 16, column0 = p.d & 0xffff;
  const auto value = [&](uint32_t cell) { return x.d == Ty::f16 ? f16_to_f32(uint16_t(cell)) : as_float(cell); };
  const auto cell = [&](float v) { return x.d == Ty::f16 ? uint32_t(f32_to_f16(v)) : as_u32(v); };
  for (uint32_t n0 = 0; n0 < x.n; n0 += 16) {
    const uint32_t columns = std::min(16u, x.n - n0);
    for (uint32_t r = 0; r < x.rows; r += 8) {
      alignas(32) float acc[16 * 8] = {};
      const auto each = [&](auto f) {
        for (uint32_t j = 0; j < columns; ++j) {
          const bool right = x.two_by_two && n0 + j >= x.columns;
          const uint32_t lane = lane0 + x.lane_of(r) + (right ? 64 : 0), c = n0 + j - (right ? x.columns : 0);
          for (uint32_t i = 0; i < 8; ++i) f(acc[8 * j + i], lane + i, column0 + c);
        }
      };
      if (p.accumulate) each([&](float& v, uint32_t lane, uint32_t column) { v = value(t.read(lane, column)); });
      const float *a = A + r * kK, *b = B + n0 * kK;
      if (card_sums)
        add_as_card(card, int(columns), int(kK), b, a, acc);
      else
        add_in_order(int(columns), int(kK), b, a, acc);
      each([&](float& v, uint32_t lane, uint32_t column) {
        if (!(disabled[lane / 32] >> (lane & 31) & 1)) t.write(lane, column, cell(v));
      });
    }
  }
}

void run(Group& g, PendingTensorWork& p) {
  const Product x = product_of(p);
  const LaunchState& ls = *p.warp->blk->ls;
  const CardSum card = card_sum(ls.arch, true, x.b, x.a, x.d, int(kK));
  thread_local std::vector<float> A[2], B;
  const auto granule = [](const Block& b, uint32_t addr) { return b.shared + (addr - kSharedBase); };
  load_operands(p, x, g, granule, B, A);
  if (x.negate_b)
    for (float& v : B) v = -v;
  for (uint32_t i = 0; i < p.pair; ++i) {
    const Block& b = *g.blocks[p.first + i];
    if (p.a_in_tensor_memory) load_from_tensor_memory(p, x, b, A[i]);
    if (x.negate_a)
      for (float& v : A[i]) v = -v;
    multiply(p, x, *b.tensor_memory, &p.disabled_lanes[4 * i], A[i].data(), B.data(), ls.card_sums, card);
  }
}

void arrive_at(Group& g, const PendingTensorWork& p, uint32_t cta) {
  Block& b = *g.blocks[cta];
  uint8_t* at = b.shared + p.mbar;
  Mbar m = load_mbar(at);
  need_valid(m, -1, p.mbar);
  arrive(g, m, 1, -1, p.mbar);
  store_mbar(at, m);
  if (b.shadow && b.shadow->race) join_clocks(b.shadow->sync[sync_key(cta, p.mbar)], p.clocks);
}

// Runs what the thread has queued up to entry `last`, in its order.
void complete(Group& g, size_t last) {
  const Warp* warp = g.tensor_work[last].warp;
  const uint32_t lane = g.tensor_work[last].lane;
  std::deque<PendingTensorWork> todo, rest;
  for (size_t i = 0; i < g.tensor_work.size(); ++i) {
    PendingTensorWork& p = g.tensor_work[i];
    (i <= last && p.warp == warp && p.lane == lane ? todo : rest).push_back(std::move(p));
  }
  g.tensor_work = std::move(rest);
  for (PendingTensorWork& p : todo) {
    if (!p.commit) run(g, p);
    for (uint32_t cta = 0; p.commit && cta < g.blocks.size(); ++cta)
      if (p.ctas >> cta & 1) arrive_at(g, p, cta);
  }
}

void queue(Warp& w, PendingTensorWork p) {
  Group& g = *w.blk->group;
  g.tensor_work.push_back(std::move(p));
  if (w.wk->ls->seeded && w.wk->random(4) == 0) complete(g, g.tensor_work.size() - 1);
  g.mbar_events++;  // sleepers check again
}

// Queues the product. Addresses, descriptors and the order of accesses are checked now; the elements are read later.
void issue(Warp& w, PendingTensorWork p) {
  Group& g = *w.blk->group;
  const auto lane = int(p.lane);
  check_descriptor(p, lane);
  const Product x = product_of(p);
  const uint32_t clock = ++g.tensor_clock;
  for (uint32_t i = 0; i < p.pair; ++i) {
    Block& b = *g.blocks[p.first + i];
    if (&b != w.blk) reach_peer(w, lane, b, false);
    TensorMemory& t = tensor_memory(b);
    const auto access = [&](uint32_t address, uint32_t columns, bool write) {
      if (const uint32_t first = address >> 16; first && (x.m != 64 || first != 16))
        fault(Fault::tensor_memory, lane,
              "tcgen05.mma with M = " + std::to_string(x.m) + " from lane " + std::to_string(first) + " on");
      each_area(x, address, columns, [&](const TensorArea& a) { t.access_by_mma(w, a, write, clock, p.line); });
    };
    if (p.a_in_tensor_memory) access(uint32_t(p.a), kK / 2, false);
    access(p.d, x.columns, true);
  }
  thread_local std::vector<float> A[2], B;
  const auto granule = [&](Block& b, uint32_t addr) {
    const uint32_t off = granule_offset(b, addr, "tcgen05");
    if (b.shadow) b.shadow->read(w, lane, off, 16, false, true, clock);
    return b.shared + off;
  };
  load_operands(p, x, g, granule, B, A);
  Counters& c = w.wk->count;
  const uint64_t flops = 2ull * x.m * x.n * kK;
  c.mma_flops += flops;
  c.tcgen05_flops += flops;
  c.tcgen05_wavefronts += (p.a_in_tensor_memory ? x.n : x.n + x.m) * kK * 2 / 128;
  w.tensor_clock = clock;
  queue(w, std::move(p));
}

PendingTensorWork work_of(Warp& w, const Op& o, int lane) {
  PendingTensorWork p;
  p.warp = &w;
  p.lane = uint32_t(lane);
  p.line = o.src->line;
  p.pair = o.d;
  p.first = w.blk->rank & ~(p.pair - 1);
  if (p.first + p.pair > w.blk->group->blocks.size())
    fault(Fault::tensor_memory, lane, "tcgen05 with cta_group::2, but the block's cluster has no pair");
  return p;
}

enum : uint32_t { A_IN_TENSOR_MEMORY = 1, NEGATED = 2, MULTICAST = 4 };

// op: a, size2, imm D's address; b A; c the descriptor; dst2 the predicate; d CTAs; ext v[0] B, v[1] disabled lanes
void mma(Warp& w, const Op& o, uint32_t m) {
  uint64_t d[32];
  fill_addresses(w, o, d);
  const uint32_t accumulate = w.p(o.dst2) ^ (o.flags & NEGATED ? FULL : 0);
  for (uint32_t t = m; t; t &= t - 1) {
    const int l = __builtin_ctz(t);
    PendingTensorWork p = work_of(w, o, l);
    p.d = uint32_t(d[l]);
    p.a_in_tensor_memory = o.flags & A_IN_TENSOR_MEMORY;
    p.a = p.a_in_tensor_memory ? w.r<uint32_t>(o.b)[l] + uint32_t(o.ext->n[0]) : w.r<uint64_t>(o.b)[l];
    p.b = w.r<uint64_t>(o.ext->v[0][0])[l];
    p.descriptor = w.r<uint32_t>(o.c)[l];
    p.accumulate = accumulate >> l & 1;
    for (size_t i = 0; i < o.ext->v[1].size(); ++i) p.disabled_lanes[i] = w.r<uint32_t>(o.ext->v[1][i])[l];
    issue(w, std::move(p));
  }
}

// op: a, size2, imm the mbarrier's address; d CTAs; ext v[0] the mask of a multicast
void commit(Warp& w, const Op& o, uint32_t m) {
  Group& g = *w.blk->group;
  uint64_t addr[32];
  fill_addresses(w, o, addr);
  for (uint32_t t = m; t; t &= t - 1) {
    const int l = __builtin_ctz(t);
    PendingTensorWork p = work_of(w, o, l);
    p.commit = true;
    Block* b;
    mbar_pointer(w, l, addr[l], &b, &p.mbar, false);
    p.ctas = 1u << b->rank;
    if (o.flags & MULTICAST) p.ctas = w.r<uint16_t>(o.ext->v[0][0])[l];
    if (!p.ctas || p.ctas >> g.blocks.size())
      fault(Fault::shared_out_of_bounds, l, "multicast mask " + hex(p.ctas) + " names a CTA outside the cluster");
    for (uint32_t cta = 0; cta < g.blocks.size(); ++cta) {
      if (!(p.ctas >> cta & 1)) continue;
      if (cta != w.blk->rank) reach_peer(w, l, *g.blocks[cta], false);
      if (w.wk->grid) w.wk->grid->hand_over(w, g.shared_grid[sync_key(cta, p.mbar)]);
    }
    if (w.blk->shadow && w.blk->shadow->race) {
      w.vc[warp_number(w)] = w.clock++;
      p.clocks = w.vc;
      // as after a tcgen05.fence::before_thread_sync
      p.clocks[tensor_core(g)] = p.clocks[2 * clock_count(w) + tensor_core(g)] = w.tensor_clock;
    }
    queue(w, std::move(p));
  }
}

}  // namespace

bool uses_columns(const PendingTensorWork& p, uint32_t first, uint32_t columns) {
  const auto overlaps = [&](uint32_t address, uint32_t n) {
    return (address & 0xffff) < first + columns && first < (address & 0xffff) + n;
  };
  return overlaps(p.d, product_of(p).columns) || (p.a_in_tensor_memory && overlaps(uint32_t(p.a), kK / 2));
}

bool complete_commit(Group& g, uint32_t cta, uint32_t mbar) {
  for (size_t i = 0; i < g.tensor_work.size(); ++i)
    if (const PendingTensorWork& p = g.tensor_work[i]; p.commit && p.mbar == mbar && p.ctas >> cta & 1) {
      complete(g, i);
      return true;
    }
  return false;
}

bool select_tensor_mma(Decoder& d, const AInstr& in, Op& op) {
  const auto not_simulated = [](const std::string& what) {
    throw Decoder::Unsupported{"tcgen05 with " + what + " is not simulated"};
  };
  op.d = has(in, "cta_group::2") ? 2 : 1;
  OpExt& e = d.ext(op);
  if (in.mods[1] == "commit") {
    op.cls = C_barrier;
    address_operand(d, in.ops[0], op);
    if (has(in, "multicast::cluster")) {
      op.flags |= MULTICAST;
      e.v[0].push_back(d.src(in.ops.at(1), 2));
    }
    return done(op, commit);
  }
  op.cls = C_mma;
  for (const char* const q : {"sp", "ws", "ashift", "block_scale"})
    if (has(in, q)) not_simulated("." + std::string(q));
  for (const auto q : in.mods)
    if (q.substr(0, 6) == "kind::" && q != "kind::f16") not_simulated("." + std::string(q));
  if (in.ops.size() < 5) return false;
  address_operand(d, in.ops[0], op);
  Op a;
  if (in.ops[1].kind == AOperand::addr) {
    op.flags |= A_IN_TENSOR_MEMORY;
    address_operand(d, in.ops[1], a);
    if (a.size2 != 4) return false;
    op.b = a.a;
  } else
    op.b = d.src(in.ops[1], 8);
  e.n.push_back(a.imm);
  e.v[0].push_back(d.src(in.ops[2], 8));
  op.c = d.src(in.ops[3], 4);
  size_t next = 4;
  if (in.ops[next].kind == AOperand::vec)
    for (const AOperand& x : in.ops[next++].elems) e.v[1].push_back(d.src(x, 4));
  if (next >= in.ops.size() || (!e.v[1].empty() && e.v[1].size() != 4 * op.d)) return false;
  bool negated;
  op.dst2 = d.pred(in.ops[next], &negated);
  if (negated) op.flags |= NEGATED;
  if (in.ops.size() > next + 1) not_simulated("scale-input-d");
  return done(op, mma);
}

}  // namespace cudasim
