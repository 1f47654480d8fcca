// The check for races between the CTAs of a launch. grid.h explains it.
#include "grid.h"

#include <algorithm>

#include "decode.h"

namespace cudasim {

// --- clocks ---------------------------------------------------------------------------------------

namespace {

uint32_t epoch_of(const Clock& c, uint32_t warp) {
  auto it = std::lower_bound(c.begin(), c.end(), std::pair{warp, 0u});
  return it != c.end() && it->first == warp ? it->second : 0;
}
bool covers(const ClockPtr& c, uint32_t warp, uint32_t epoch) { return c && epoch_of(*c, warp) >= epoch; }

ClockPtr join(const ClockPtr& a, const ClockPtr& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  auto out = std::make_shared<Clock>();
  out->reserve(a->size() + b->size());
  auto x = a->begin(), y = b->begin();
  bool all_a = true, all_b = true;  // the result is a (b) itself
  while (x != a->end() || y != b->end()) {
    if (y == b->end() || (x != a->end() && x->first < y->first)) {
      out->push_back(*x++);
      all_b = false;
    } else if (x == a->end() || y->first < x->first) {
      out->push_back(*y++);
      all_a = false;
    } else {
      if (x->second < y->second) all_a = false;
      if (y->second < x->second) all_b = false;
      out->push_back({x->first, std::max(x->second, y->second)});
      ++x, ++y;
    }
  }
  return all_a ? a : all_b ? b : out;
}
ClockPtr with(const ClockPtr& c, uint32_t warp, uint32_t epoch) {
  auto out = c ? std::make_shared<Clock>(*c) : std::make_shared<Clock>();
  auto it = std::lower_bound(out->begin(), out->end(), std::pair{warp, 0u});
  if (it != out->end() && it->first == warp)
    it->second = epoch;
  else
    out->insert(it, {warp, epoch});
  return out;
}

constexpr size_t kMemory = size_t{1} << 30;  // for remembering accesses, per launch
constexpr uint32_t kPageBits = 12;

}  // namespace

// --- memory ---------------------------------------------------------------------------------------

// The words of 4 KiB. A word has four bytes until the first smaller access to the page.
struct Grid::Page {
  std::atomic_flag busy;
  uint8_t shift = 2;
  std::vector<Written> written;  // empty if nothing on the page was written
  std::vector<Seen> seen;
  size_t cells() const { return size_t{1} << (kPageBits - shift); }
  template <class T>
  static void split(std::vector<T>& v, int bits) {
    if (v.empty()) return;
    std::vector<T> out(v.size() << bits);
    for (size_t i = 0; i < out.size(); ++i) out[i] = v[i >> bits];
    v.swap(out);
  }
  void refine(uint8_t to) {
    split(written, shift - to);
    split(seen, shift - to);
    shift = to;
  }
};

enum : uint32_t {
  M_STRONG = 1,
  M_SAME = 2,
  M_CONSTANT = 4,
  M_ATOMIC = 8,
  M_LINE = 4
};  // mark: flags, then the PTX line

struct Grid::Access {
  Warp& w;
  uint32_t kind, mark, bytes;
  Page* locked = nullptr;
  void unlock() {
    if (locked) locked->busy.clear(std::memory_order_release);
    locked = nullptr;
  }
  ~Access() { unlock(); }
};

Grid::Grid(const LaunchState& ls, bool same_value_is_fine)
    : orders(ls.image->has_fences),
      ls_(ls),
      kernel_(ls.kernel->name),
      grid_(ls.grid.x, ls.grid.y),
      same_value_is_fine_(same_value_is_fine),
      nwarps_((ls.block.x * ls.block.y * ls.block.z + 31) / 32) {}
Grid::~Grid() = default;

void Grid::start(Warp& w) {
  w.grid = GridWarp();
  w.grid.first = w.blk->linear * nwarps_;
  w.grid.number = w.grid.first + w.index;
}

Grid::Page* Grid::page(Warp& w, uint64_t number) {
  auto& slot = w.wk->grid_pages[number % std::size(w.wk->grid_pages)];
  if (slot.first == number) return static_cast<Page*>(slot.second);
  std::lock_guard lock(pages_mutex_);
  auto it = pages_.find(number);
  if (it == pages_.end()) {
    if (bytes_ > kMemory) {
      if (!said_full_.exchange(true))
        fprintf(stderr,
                "cudasim: kernel %s touches too much memory: the check of races between blocks sees only a part\n",
                ls_.kernel->name.c_str());
      slot = {number, nullptr};  // it stays unknown
      return nullptr;
    }
    it = pages_.emplace(number, std::make_unique<Page>()).first;
  }
  slot = {number, it->second.get()};
  return it->second.get();
}

bool Grid::ordered(const Warp& w, uint32_t who, uint32_t epoch) const { return covers(w.grid.known, who - 1, epoch); }

static uint32_t line_of(const Warp& w) {
  const AInstr* i = w.frame && w.pc ? w.frame->fn->code[w.pc - 1].src : nullptr;
  return i ? i->line : 0;
}

void Grid::access(Warp& w, uint32_t lanes, const uint64_t* addr, uint32_t bytes, uint32_t kind,
                  const uint8_t* const* data) {
  Access a{w, kind,
           line_of(w) << M_LINE | (kind & Strong ? M_STRONG : 0) | (kind & Constant ? M_CONSTANT : 0) |
               (kind & Atomic ? M_ATOMIC : 0),
           bytes};
  if (ls_.after) check_earlier(a, lanes, addr);
  uint64_t current = ~0ull;
  for (uint32_t t = lanes; t; t &= t - 1) {
    int l = __builtin_ctz(t);
    uint64_t number = addr[l] >> kPageBits;
    if (number != current) {
      a.unlock();
      current = number;
      if (Page* p = page(w, number)) {
        while (p->busy.test_and_set(std::memory_order_acquire)) {
        }
        a.locked = p;
        if (bytes < 4 && p->shift > (bytes == 2 ? 1 : 0)) p->refine(bytes == 2 ? 1 : 0);
        size_t size = p->written.size() + p->seen.size();
        if (kind & Write && p->written.empty()) p->written.resize(p->cells());
        if (!(kind & Write) && p->seen.empty()) p->seen.resize(p->cells());
        if (size != p->written.size() + p->seen.size())
          bytes_ += p->cells() * (kind & Write ? sizeof(Written) : sizeof(Seen));
      }
    }
    if (a.locked) lane_access(a, *a.locked, l, addr[l], bytes, data ? data[l] : nullptr);
  }
}

// Against the launches that may still run.
void Grid::check_earlier(Access& a, uint32_t lanes, const uint64_t* addr) const {
  const bool waited = ordered_after_wait(a.w), writes = a.kind & Write;
  std::string by;
  if (a.kind & Constant)  // for memory that nobody writes while this launch runs, which began before those ended
    for (const auto& other : ls_.after->before_wait)
      for (uint32_t t = lanes; t; t &= t - 1) {
        const int l = __builtin_ctz(t);
        if (other->touched(addr[l], a.bytes, false, &by))
          fault(Fault::non_coherent, l,
                "non-coherent load: ld.global.nc reads " + std::to_string(a.bytes) + " bytes at " + hex(addr[l]) +
                    ", which " + by + " of the earlier kernel " + other->kernel_ +
                    " writes. This launch may start before that one has ended, so that the load may move before "
                    "griddepcontrol.wait: read the memory with ld.global or ld.global.cg");
      }
  for (const auto& other : waited ? ls_.after->after_wait : ls_.after->before_wait)
    for (uint32_t t = lanes; t; t &= t - 1) {
      const int l = __builtin_ctz(t);
      if (!other->touched(addr[l], a.bytes, writes, &by)) continue;
      fault(Fault::grid_race, l,
            std::string("race between launches: ") + (writes ? "write" : "read") + " of " + std::to_string(a.bytes) +
                " bytes at " + hex(addr[l]) + ", which " + by + " of the earlier kernel " + other->kernel_ +
                " accesses. " +
                (waited ? "That kernel may still run, because the one between did not execute griddepcontrol.wait"
                        : "That kernel may still run before griddepcontrol.wait"));
    }
}

bool Grid::touched(uint64_t addr, uint32_t bytes, bool or_read, std::string* by) const {
  for (const uint64_t end = addr + bytes; addr < end; ++addr) {
    const auto it = pages_.find(addr >> kPageBits);
    if (it == pages_.end()) return false;  // accesses are aligned, so it is one page
    const Page& p = *it->second;
    const size_t cell = (addr & ((1u << kPageBits) - 1)) >> p.shift;
    const uint32_t who = !p.written.empty() && p.written[cell].who ? p.written[cell].who
                         : or_read && !p.seen.empty()              ? p.seen[cell].who
                                                                   : 0;
    if (!who) continue;
    *by = block_name(who);
    return true;
  }
  return false;
}

void Grid::access_range(Warp& w, int lane, uint64_t addr, uint64_t bytes, uint32_t kind) {
  uint64_t at[32];
  for (uint64_t end = addr + bytes; addr < end;) {
    uint32_t n = addr % 16 == 0 && end - addr >= 16 ? 16
                 : addr % 4 == 0 && end - addr >= 4 ? 4
                 : addr % 2 == 0 && end - addr >= 2 ? 2
                                                    : 1;
    at[lane] = addr;
    access(w, 1u << lane, at, n, kind, nullptr);
    addr += n;
  }
}

void Grid::lane_access(Access& a, Page& p, int lane, uint64_t addr, uint32_t bytes, const uint8_t* data) {
  const GridWarp& me = a.w.grid;
  const uint32_t step = 1u << p.shift, own = me.first + 1, mark = a.mark;
  const auto foreign = [&](uint32_t who) { return who - own >= nwarps_; };  // who is not 0
  size_t cell = (addr & ((1u << kPageBits) - 1)) >> p.shift;
  for (uint32_t at = 0; at < bytes; at += step, ++cell) {
    if (!(a.kind & Write)) {
      if (!p.written.empty()) {
        const Written& x = p.written[cell];
        if (x.who) {
          if (mark & M_CONSTANT) report(a, lane, addr + at, "write", x.who, x.epoch, x.mark, false);
          if (foreign(x.who) && !(mark & x.mark & M_STRONG) && !ordered(a.w, x.who, x.epoch))
            report(a, lane, addr + at, "write", x.who, x.epoch, x.mark, x.mark & M_SAME);
        }
      }
      Seen& y = p.seen[cell];
      if (y.who && foreign(y.who)) {
        y.who2 = y.who;
        y.epoch2 = y.epoch;
      }
      y.who = me.number + 1;
      y.epoch = me.epoch;
      y.mark = mark | (y.mark & M_CONSTANT);
      continue;
    }
    Written& x = p.written[cell];
    uint32_t new_mark = mark;
    const bool equal = data && memcmp(data + at, reinterpret_cast<const uint8_t*>(addr) + at, step) == 0;
    if (x.who && equal && (foreign(x.who) || x.mark & M_SAME)) new_mark |= M_SAME;
    if (x.who && foreign(x.who)) {
      if (!(mark & x.mark & M_STRONG) && !ordered(a.w, x.who, x.epoch))
        report(a, lane, addr + at, "write", x.who, x.epoch, x.mark, equal);
    }
    if (!p.seen.empty()) {
      const Seen& y = p.seen[cell];
      if (y.mark & M_CONSTANT) report(a, lane, addr + at, "read", y.who, y.epoch, y.mark, false);
      const bool same = new_mark & M_SAME;
      if (y.who && !(mark & y.mark & M_STRONG)) {
        if (foreign(y.who) && !ordered(a.w, y.who, y.epoch))
          report(a, lane, addr + at, "read", y.who, y.epoch, y.mark, same);
        if (y.who2 && foreign(y.who2) && !ordered(a.w, y.who2, y.epoch2))
          report(a, lane, addr + at, "read", y.who2, y.epoch2, 0, same);
      }
    }
    x = {me.number + 1, me.epoch, new_mark};
  }
}

// --- reports --------------------------------------------------------------------------------------

std::string Grid::block_name(uint32_t who) const {
  const uint32_t b = (who - 1) / nwarps_;
  const auto [x, y] = grid_;
  return "block (" + std::to_string(b % x) + "," + std::to_string(b / x % y) + "," + std::to_string(b / x / y) +
         ") warp " + std::to_string((who - 1) % nwarps_);
}

void Grid::report(Access& a, int lane, uint64_t addr, const char* before, uint32_t who, uint32_t epoch, uint32_t mark,
                  bool same) {
  const Warp& w = a.w;
  const bool tolerated = same && same_value_is_fine_;
  if (tolerated && said_same_.exchange(true)) return;
  if (!tolerated) a.unlock();
  const bool constant = a.kind & Constant || mark & M_CONSTANT;
  const char* now = a.kind & Atomic ? "atomic" : a.kind & Write ? "write" : "read";
  if (mark & M_ATOMIC) before = "atomic";
  std::string where = std::to_string(a.bytes) + " bytes at " + hex(addr);
  for (const Range& r : *ls_.ranges)
    if (addr >= r.base && addr < r.end)
      where += " (offset " + std::to_string(addr - r.base) + " of an allocation of " + std::to_string(r.end - r.base) +
               " bytes)";
  const std::string at_line = mark >> M_LINE ? " at PTX line " + std::to_string(mark >> M_LINE) : "";
  if (constant) {
    fault(
        Fault::non_coherent, lane,
        "non-coherent load: " +
            (a.kind & Constant
                 ? "ld.global.nc reads " + where + ", which " + block_name(who) + " wrote in the same launch" + at_line
                 : std::string(now) + " of " + where + ", which was read by ld.global.nc in the same launch, last by " +
                       block_name(who) + at_line));
  }
  std::string text = std::string(same ? "same-value write race between blocks: " : "race between blocks: ") + now +
                     " of " + where + " is not ordered after a " + before + " by " + block_name(who) + at_line;
  if (!orders)
    text += " (the kernel has no fence)";
  else {
    std::lock_guard lock(mutex);
    bool out = false;
    for (auto& [at, p] : published_) out |= covers(p.clock, who - 1, epoch) || covers(p.sc, who - 1, epoch);
    if (covers(w.grid.seen, who - 1, epoch) || covers(w.grid.seen_sc, who - 1, epoch))
      text += " (this block has read what published it, but executed no fence after that)";
    else if (out)
      text += " (it was published by a strong write, which this block has not read)";
    else
      text +=
          " (nothing publishes it: a fence and then an atomic or volatile write have to follow, after a barrier if "
          "another warp's)";
  }
  if (tolerated)
    fprintf(stderr, "cudasim: kernel %s: %s\n", ls_.kernel->name.c_str(), text.c_str());
  else
    fault(same ? Fault::grid_same_value : Fault::grid_race, lane, text);
}

// --- order ----------------------------------------------------------------------------------------

void Grid::fence(Warp& w, bool sc) {
  if (!orders) return;
  GridWarp& g = w.grid;
  g.known = join(g.known, g.seen);
  g.seen.reset();
  if (sc) {
    g.known = join(g.known, g.seen_sc);
    g.seen_sc.reset();
  }
  g.fenced = with(g.known, g.number, g.epoch);
  if (sc) g.fenced_sc = join(g.fenced_sc, g.fenced);
  g.epoch++;
}

void Grid::observe(Warp& w, uint32_t lanes, const uint64_t* addr, uint32_t order) {
  if (!orders || published_.empty()) return;
  GridWarp& g = w.grid;
  for (uint32_t t = lanes; t; t &= t - 1) {
    auto it = published_.find(addr[__builtin_ctz(t)]);
    if (it == published_.end()) continue;
    ClockPtr& to = order & Acquire ? g.known : g.seen;
    to = join(to, it->second.clock);
    g.seen_sc = join(g.seen_sc, it->second.sc);
  }
}

void Grid::publish(Warp& w, uint32_t lanes, const uint64_t* addr, uint32_t order) {
  if (!orders) return;
  GridWarp& g = w.grid;
  any_published = true;
  const Published mine{order & Release ? with(g.known, g.number, g.epoch) : g.fenced, g.fenced_sc};
  for (uint32_t t = lanes; t; t &= t - 1) {
    const uint64_t at = addr[__builtin_ctz(t)];
    if (!(order & Modify)) {
      if (mine.clock || mine.sc)
        published_[at] = mine;
      else
        published_.erase(at);
    } else if (mine.clock || mine.sc) {
      Published& p = published_[at];
      p.clock = join(p.clock, mine.clock);
      p.sc = join(p.sc, mine.sc);
    }
  }
  if (order & Release) g.epoch++;
}

void Grid::hand_over(Warp& w, Handover& to) {
  if (!orders) return;
  GridWarp& g = w.grid;
  to.known = join(to.known, with(g.known, g.number, g.epoch));
  to.fenced_sc = join(to.fenced_sc, g.fenced_sc);
  to.seen_sc = join(to.seen_sc, g.seen_sc);
  g.epoch++;
}
void Grid::take_over(Warp& w, const Handover& from) {
  if (!orders) return;
  GridWarp& g = w.grid;
  g.known = join(g.known, from.known);
  g.fenced_sc = join(g.fenced_sc, from.fenced_sc);
  g.seen_sc = join(g.seen_sc, from.seen_sc);
}

void Grid::barrier(Block& b, const std::vector<uint32_t>& arrived, const std::vector<uint32_t>& released) {
  if (!orders) return;
  // Warps that have met at a barrier share their clock, so this is mostly one copy of it.
  Handover all;
  auto own = std::make_shared<Clock>();
  for (uint32_t i : arrived) {
    GridWarp& g = b.warps[i]->grid;
    all.known = join(all.known, g.known);
    all.fenced_sc = join(all.fenced_sc, g.fenced_sc);
    all.seen_sc = join(all.seen_sc, g.seen_sc);
    own->push_back({g.number, g.epoch++});
  }
  std::sort(own->begin(), own->end());
  all.known = join(all.known, own);
  for (uint32_t i : released) {
    GridWarp& g = b.warps[i]->grid;
    g.known = all.known;
    g.fenced_sc = all.fenced_sc;
    g.seen_sc = all.seen_sc;
  }
}

}  // namespace cudasim
