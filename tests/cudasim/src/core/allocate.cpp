// Assigns register slots. Virtual registers whose lifetimes do not overlap share a slot, so a warp's frame stays small
// enough for the caches. Lifetimes come from data-flow analysis over the control flow graph, widened to one interval of
// instruction numbers per register. Two registers of the same instruction never share a slot, so handlers may write
// before they have read everything.
#include <algorithm>

#include "decode.h"

namespace cudasim {

namespace {

using Words = std::vector<uint64_t>;
bool test(const Words& w, int r) { return w[size_t(r) >> 6] >> (r & 63) & 1; }
void set(Words& w, int r) { w[size_t(r) >> 6] |= 1ull << (r & 63); }

template <class F>
void each_reg(const AOperand& o, F f) {
  if (o.kind == AOperand::reg) f(o.reg_id);
  for (auto& e : o.elems) each_reg(e, f);
}

// Is operand 0 written and not read? In doubt the answer is no, which only lengthens lifetimes.
bool writes_first(const AInstr& in) {
  auto n = in.mods[0];
  if (in.ops.empty()) return false;
  auto k = in.ops[0].kind;
  if (k != AOperand::reg && k != AOperand::vec && k != AOperand::pair) return false;
  if (n == "bar" || n == "barrier") return has(in, "red");
  for (auto x : {"st",      "red",       "bra",     "brx",           "call",           "ret",      "exit",
                 "cp",      "nanosleep", "wgmma",   "stmatrix",      "setmaxnreg",     "prefetch", "prefetchu",
                 "fence",   "membar",    "discard", "applypriority", "griddepcontrol", "trap",     "brkpt",
                 "pmevent", "tensormap"})
    if (n == x) return false;
  if (n == "tcgen05") return in.mods.size() > 1 && in.mods[1] == "ld";
  if (n == "wmma") return in.mods.size() > 1 && (in.mods[1] == "load" || in.mods[1] == "mma");
  return selectors().count(n) != 0;
}

}  // namespace

// Returns a colour for every register; registers of equal colour and equal size share storage.
std::vector<uint32_t> colour_registers(const Decoder& d, const AFunction& f) {
  const int n = int(f.regs.size());
  const size_t count = f.body.size();
  std::vector<uint32_t> colour(size_t(n), 0);
  if (n == 0 || count == 0) {
    for (int r = 0; r < n; ++r) colour[size_t(r)] = uint32_t(r);
    return colour;
  }

  // control flow graph
  std::vector<std::vector<uint32_t>> targets(count);
  std::vector<uint8_t> leader(count + 1, 0);
  leader[0] = 1;
  std::vector<uint8_t> ends(count, 0), falls(count, 1);
  for (auto& l : f.labels) leader[l.index] = 1;
  for (size_t i = 0; i < count; ++i) {
    const AInstr& in = f.body[i];
    auto m = in.mods[0];
    if (m == "bra" || m == "brx") {
      if (m == "bra" && !in.ops.empty() && in.ops[0].kind == AOperand::sym)
        targets[i].push_back(d.label(in.ops[0].name, in.ops[0].scope));
      else
        for (auto& t : f.tables)
          if (in.ops.size() == 2 && t.name == in.ops[1].name)
            for (auto& l : t.targets) targets[i].push_back(d.label(l, t.scope));
      for (auto t : targets[i])
        if (t == NONE) return {};
      ends[i] = 1;
      falls[i] = in.pred >= 0;
    } else if (m == "ret" || m == "exit") {
      ends[i] = 1;
      falls[i] = in.pred >= 0;
    }
    if (ends[i]) leader[i + 1] = 1;
  }
  struct Block {
    uint32_t first, last;
    std::vector<uint32_t> next;
    Words use, def, in, out;
  };
  std::vector<Block> blocks;
  std::vector<uint32_t> block_of(count + 1, NONE);
  for (size_t i = 0; i < count; ++i) {
    if (leader[i]) blocks.push_back({uint32_t(i), uint32_t(i), {}, {}, {}, {}, {}});
    blocks.back().last = uint32_t(i);
    block_of[i] = uint32_t(blocks.size() - 1);
  }
  const size_t words = size_t(n + 63) / 64;
  Words pinned(words, 0);
  std::vector<uint32_t> lo(size_t(n), NONE), hi(size_t(n), 0);
  auto touch = [&](int r, uint32_t at) {
    lo[size_t(r)] = std::min(lo[size_t(r)], at);
    hi[size_t(r)] = std::max(hi[size_t(r)], at);
  };
  for (auto& b : blocks) {
    b.use.assign(words, 0);
    b.def.assign(words, 0);
    b.in.assign(words, 0);
    b.out.assign(words, 0);
    for (uint32_t i = b.first; i <= b.last; ++i) {
      const AInstr& in = f.body[i];
      auto use = [&](int r) {
        touch(r, i);
        if (!test(b.def, r)) set(b.use, r);
      };
      const bool wr = writes_first(in);
      const bool late =
          in.mods[0] == "wgmma" || (in.mods[0] == "tcgen05" && wr);  // registers are used after the instruction
      if (in.pred >= 0) use(in.pred);
      for (size_t k = wr ? 1 : 0; k < in.ops.size(); ++k) each_reg(in.ops[k], use);
      if (wr)
        each_reg(in.ops[0], [&](int r) {
          touch(r, i);
          if (in.pred >= 0)
            use(r);
          else
            set(b.def, r);
        });
      if (late)
        for (auto& o : in.ops) each_reg(o, [&](int r) { set(pinned, r); });
    }
    for (auto t : targets[b.last])
      if (t < count) b.next.push_back(block_of[t]);
    if (falls[b.last] && b.last + 1 < count) b.next.push_back(block_of[b.last + 1]);
  }
  for (bool change = true; change;) {
    change = false;
    for (size_t k = blocks.size(); k-- > 0;) {
      Block& b = blocks[k];
      for (size_t w = 0; w < words; ++w) {
        uint64_t out = b.out[w];
        for (auto s : b.next) out |= blocks[s].in[w];
        uint64_t in = b.use[w] | (out & ~b.def[w]);
        if (out != b.out[w] || in != b.in[w]) {
          b.out[w] = out;
          b.in[w] = in;
          change = true;
        }
      }
    }
  }
  for (auto& b : blocks)
    for (size_t w = 0; w < words; ++w) {
      for (uint64_t t = b.in[w]; t; t &= t - 1) touch(int(w * 64) + __builtin_ctzll(t), b.first);
      for (uint64_t t = b.out[w]; t; t &= t - 1) touch(int(w * 64) + __builtin_ctzll(t), b.last);
    }

  // linear scan, one pool of colours per storage size
  auto size_class = [&](int r) {
    int s = f.regs[size_t(r)] == Ty::pred ? 0 : ty_size(f.regs[size_t(r)]);
    return s <= 1 ? (s == 0 ? 0 : 1) : s == 2 ? 1 : s == 4 ? 2 : s == 8 ? 3 : 4;
  };
  std::vector<int> order;
  uint32_t next[5] = {};
  for (int r = 0; r < n; ++r) {
    if (lo[size_t(r)] == NONE) continue;
    if (test(pinned, r))
      colour[size_t(r)] = next[size_class(r)]++;
    else
      order.push_back(r);
  }
  std::sort(order.begin(), order.end(), [&](int a, int b) { return lo[size_t(a)] < lo[size_t(b)]; });
  std::vector<std::pair<uint32_t, uint32_t>> active[5];  // heap of (end, colour)
  std::vector<uint32_t> free_list[5];
  for (int r : order) {
    int c = size_class(r);
    auto& a = active[c];
    while (!a.empty() && a.front().first < lo[size_t(r)]) {
      std::pop_heap(a.begin(), a.end(), std::greater<>());
      free_list[c].push_back(a.back().second);
      a.pop_back();
    }
    uint32_t x;
    if (!free_list[c].empty()) {
      x = free_list[c].back();
      free_list[c].pop_back();
    } else
      x = next[c]++;
    colour[size_t(r)] = x;
    a.push_back({hi[size_t(r)], x});
    std::push_heap(a.begin(), a.end(), std::greater<>());
  }
  return colour;
}

}  // namespace cudasim
