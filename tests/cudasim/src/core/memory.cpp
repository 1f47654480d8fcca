// Address resolution, access checks and memory counters.
#include <algorithm>
#include <map>

#include "decode.h"
#include "lanes.h"
#include "shadow.h"

namespace cudasim {

// --- the registry of live allocations ----------------------------------------------------------------

namespace {
struct Registry {
  std::mutex mutex;
  std::map<uint64_t, uint64_t> live;  // base -> end
  std::shared_ptr<const std::vector<Range>> snapshot;
};
Registry& registry() {
  static Registry* r = new Registry;  // never destroyed: the runtime may free memory at exit
  return *r;
}
}  // namespace

void register_allocation(const void* base, size_t size) {
  Registry& r = registry();
  std::lock_guard<std::mutex> lock(r.mutex);
  if (size == 0) return;
  r.live[uint64_t(base)] = uint64_t(base) + size;
  r.snapshot.reset();
}
void unregister_allocation(const void* base) {
  Registry& r = registry();
  std::lock_guard<std::mutex> lock(r.mutex);
  r.live.erase(uint64_t(base));
  r.snapshot.reset();
}
std::shared_ptr<const std::vector<Range>> current_ranges() {
  Registry& r = registry();
  std::lock_guard<std::mutex> lock(r.mutex);
  if (!r.snapshot) {
    auto v = std::make_shared<std::vector<Range>>();
    v->reserve(r.live.size());
    for (auto& [b, e] : r.live) v->push_back({b, e});
    r.snapshot = v;
  }
  return r.snapshot;
}

static const Range* find_range(Worker& wk, uint64_t addr) {
  const LaunchState& ls = *wk.ls;
  static thread_local Range params;
  params = {uint64_t(ls.params.data()), uint64_t(ls.params.data()) + ls.params.size()};
  if (addr - params.base < params.end - params.base) return &params;
  const auto& v = *ls.ranges;
  auto it = std::upper_bound(v.begin(), v.end(), addr, [](uint64_t a, const Range& r) { return a < r.base; });
  if (it == v.begin()) return nullptr;
  --it;
  return addr < it->end ? &*it : nullptr;
}

bool global_ok(Worker& wk, uint64_t addr, uint64_t bytes) {
  if (addr >= wk.hit.base && addr + bytes <= wk.hit.end) return true;
  if (addr >= wk.hit2.base && addr + bytes <= wk.hit2.end) {
    std::swap(wk.hit, wk.hit2);
    return true;
  }
  const Range* r = find_range(wk, addr);
  if (!r || addr + bytes > r->end) return false;
  wk.hit2 = wk.hit;
  wk.hit = *r;
  return true;
}

static const char* verb(Access a) { return a == Access::read ? "read" : a == Access::write ? "write" : "atomic"; }

[[noreturn]] static void misaligned(int lane, const char* space, uint64_t addr, uint32_t bytes, Access a) {
  fault(Fault::misaligned, lane,
        std::string("misaligned ") + space + " " + verb(a) + " of " + std::to_string(bytes) + " bytes at " + hex(addr));
}

static std::string nearest(const Worker& wk, uint64_t addr) {
  const auto& v = *wk.ls->ranges;
  if (v.empty()) return "no device memory is allocated";
  auto it = std::upper_bound(v.begin(), v.end(), addr, [](uint64_t a, const Range& r) { return a < r.base; });
  if (it != v.begin()) {
    auto p = it - 1;
    return std::to_string(addr - p->end) + " bytes past the end of the allocation [" + hex(p->base) + ", " +
           hex(p->end) + ") of " + std::to_string(p->end - p->base) + " bytes";
  }
  return std::to_string(it->base - addr) + " bytes before the allocation at " + hex(it->base);
}

void global_pointers(Warp& w, uint32_t m, const uint64_t* addr, uint32_t bytes, Access a, uint8_t** out) {
  uint64_t any = 0, lo = ~0ull, hi = 0;
  if (m == FULL) {
    FOR_LANES {
      any |= addr[i];
      lo = addr[i] < lo ? addr[i] : lo;
      hi = addr[i] > hi ? addr[i] : hi;
    }
  } else {
    for (uint32_t t = m; t; t &= t - 1) {
      uint64_t x = addr[__builtin_ctz(t)];
      any |= x;
      lo = std::min(lo, x);
      hi = std::max(hi, x);
    }
  }
  if (__builtin_expect((any & (bytes - 1)) != 0, 0))
    for (uint32_t t = m; t; t &= t - 1)
      if (addr[__builtin_ctz(t)] & (bytes - 1))
        misaligned(__builtin_ctz(t), "global", addr[__builtin_ctz(t)], bytes, a);
  Worker& wk = *w.wk;
  bool ok = lo >= wk.hit.base && hi + bytes <= wk.hit.end;
  if (!ok && lo >= wk.hit2.base && hi + bytes <= wk.hit2.end) {
    std::swap(wk.hit, wk.hit2);
    ok = true;
  }
  if (!ok)
    for (uint32_t t = m; t; t &= t - 1) {
      int l = __builtin_ctz(t);
      if (!global_ok(wk, addr[l], bytes))
        fault(Fault::global_out_of_bounds, l,
              std::string("global ") + verb(a) + " of " + std::to_string(bytes) + " bytes at " + hex(addr[l]) +
                  " is outside every allocation: " + nearest(wk, addr[l]));
    }
  FOR_LANES out[i] = reinterpret_cast<uint8_t*>(addr[i]);
}

Block* shared_target(Warp& w, uint32_t addr, uint32_t* offset) {
  uint32_t rank = addr >> 24;
  *offset = (addr & 0xffffffu) - kSharedBase;
  return rank < w.blk->group->blocks.size() ? w.blk->group->blocks[rank].get() : nullptr;
}

[[noreturn]] static void shared_oob(Warp& w, int lane, uint64_t addr, uint32_t bytes, Access a) {
  fault(Fault::shared_out_of_bounds, lane,
        std::string("shared ") + verb(a) + " of " + std::to_string(bytes) + " bytes at shared address " + hex(addr) +
            " (offset " + std::to_string(int64_t(addr & 0xffffff) - kSharedBase) + ") is outside the block's " +
            std::to_string(w.blk->shared_bytes) + " bytes");
}

void shared_pointers(Warp& w, uint32_t m, const uint64_t* addr, uint32_t bytes, Access a, uint8_t** out, const Op*) {
  const uint32_t size = w.blk->shared_bytes, start = w.blk->shared_window() + kSharedBase;
  uint8_t* base = w.blk->shared;
  uint32_t any = 0, hi = 0;
  uint32_t off[32];
  if (m == FULL) {
    FOR_LANES {
      off[i] = uint32_t(addr[i]) - start;
      any |= off[i];
      hi = off[i] > hi ? off[i] : hi;
    }
  } else {
    FOR_LANES off[i] = uint32_t(addr[i]) - start;
    for (uint32_t t = m; t; t &= t - 1) {
      uint32_t x = off[__builtin_ctz(t)];
      any |= x;
      hi = std::max(hi, x);
    }
  }
  if (__builtin_expect((any & (bytes - 1)) != 0, 0))
    for (uint32_t t = m; t; t &= t - 1) {
      int l = __builtin_ctz(t);
      if (uint32_t(addr[l]) & (bytes - 1)) misaligned(l, "shared", addr[l], bytes, a);
    }
  if (__builtin_expect(uint64_t(hi) + bytes <= size, 1)) {
    FOR_LANES out[i] = base + off[i];
    return;
  }
  for (uint32_t t = m; t; t &= t - 1) {
    int l = __builtin_ctz(t);
    uint32_t o;
    Block* b = shared_target(w, uint32_t(addr[l]), &o);
    if (!b || uint64_t(o) + bytes > b->shared_bytes) shared_oob(w, l, uint32_t(addr[l]), bytes, a);
    if (b != w.blk) reach_peer(w, l, *b, true);
    out[l] = b->shared + o;
  }
}

void local_pointers(Warp& w, uint32_t m, const uint64_t* addr, uint32_t bytes, uint8_t** out) {
  for (uint32_t t = m; t; t &= t - 1) {
    int l = __builtin_ctz(t);
    uint32_t a = uint32_t(addr[l]);
    if (a & (bytes - 1)) misaligned(l, "local", a, bytes, Access::read);
    if (a < kLocalBase || uint64_t(a) + bytes > w.local_stride)
      fault(Fault::global_out_of_bounds, l,
            "local memory access of " + std::to_string(bytes) + " bytes at local address " + hex(a) +
                " is outside the thread's frame");
    out[l] = w.local.data() + size_t(l) * w.local_stride + a;
  }
}

uint8_t* generic_pointer(Warp& w, int lane, uint64_t addr, uint32_t bytes, Access a) {
  uint64_t arr[32];
  uint8_t* out[32];
  arr[lane] = addr;
  uint64_t win = addr & kWindowMask;
  for (int i = 0; i < 32; ++i) arr[i] = addr;
  if (win == kSharedWindow)
    shared_pointers(w, 1u << lane, arr, 1, a, out, nullptr), (void)bytes;
  else if (win == kLocalWindow)
    local_pointers(w, 1u << lane, arr, 1, out);
  else {
    if (!global_ok(*w.wk, addr, bytes)) global_pointers(w, 1u << lane, arr, 1, a, out);
    out[lane] = reinterpret_cast<uint8_t*>(addr);
  }
  return out[lane];
}

std::string generic_string(Warp& w, int lane, uint64_t addr) {
  std::string s;
  for (int i = 0; i < 65536; ++i) {
    char c = char(*generic_pointer(w, lane, addr + i, 1, Access::read));
    if (!c) break;
    s += c;
  }
  return s;
}

// --- counters ------------------------------------------------------------------------------------------

void Footprint::find(uint64_t page) {
  auto& p = pages_[page];
  if (!p) p = std::make_unique<uint64_t[]>(512);
  last_ = page;
  bits_ = p.get();
}
void Footprint::merge_from(const Footprint& o) {
  for (auto& [k, v] : o.pages_) {
    find(k);
    for (int i = 0; i < 512; ++i) bits_[i] |= v[i];
  }
}
uint64_t Footprint::sectors() const {
  uint64_t n = 0;
  for (auto& [k, v] : pages_)
    for (int i = 0; i < 512; ++i) n += uint64_t(__builtin_popcountll(v[i]));
  return n;
}

void count_global(Warp& w, uint32_t m, const uint64_t* addr, uint32_t bytes, bool write) {
  Counters& c = w.wk->count;
  Footprint& fp = write ? w.wk->written : w.wk->read;
  uint64_t sectors = 0;
  bool run = m == FULL;
  if (run) {
    uint64_t bad = 0, a0 = addr[0];
    FOR_LANES bad |= addr[i] ^ (a0 + uint64_t(i) * bytes);
    run = bad == 0;
  }
  if (run) {
    sectors = ((addr[0] + 32 * bytes - 1) >> 5) - (addr[0] >> 5) + 1;
    fp.add(addr[0], 32 * bytes);
  } else {
    // each aligned access of at most 32 bytes lies in one sector
    uint64_t table[64];
    uint64_t used = 0, last = ~0ull;
    for (uint32_t t = m; t; t &= t - 1) {
      uint64_t s = addr[__builtin_ctz(t)] >> 5;
      if (s == last) continue;
      last = s;
      uint32_t h = uint32_t((s ^ (s >> 6) ^ (s >> 13)) & 63);
      while (used >> h & 1) {
        if (table[h] == s) break;
        h = (h + 1) & 63;
      }
      if (!(used >> h & 1)) {
        used |= 1ull << h;
        table[h] = s;
        ++sectors;
        fp.add(s << 5, 1);
      }
    }
  }
  uint64_t ideal = (uint64_t(__builtin_popcount(m)) * bytes + 31) / 32;
  if (write) {
    c.sectors_written += sectors;
    c.sectors_written_ideal += ideal;
  } else {
    c.sectors_read += sectors;
    c.sectors_read_ideal += ideal;
  }
}

// Lanes are served in groups that together move 128 bytes; within a group, accesses to different
// granules (of the access size) of the same bank set take one wavefront each.
void count_shared(Warp& w, uint32_t m, const uint64_t* addr, uint32_t bytes) {
  Counters& c = w.wk->count;
  const uint32_t shift = bytes <= 4 ? 2 : bytes == 8 ? 3 : 4;
  const uint32_t per = 128u >> shift, sets = per;  // lanes served together; bank sets
  for (uint32_t g = 0; g < 32; g += per) {
    uint32_t gm = per == 32 ? m : m >> g & ((1u << per) - 1);
    if (!gm) continue;
    c.wavefronts_ideal++;
    uint32_t seen[32][32];
    uint8_t n[32] = {};
    uint32_t worst = 1, lo = NONE, hi = 0;
    for (uint32_t t = gm; t; t &= t - 1) {
      uint32_t x = uint32_t(addr[g + uint32_t(__builtin_ctz(t))]) >> shift;
      lo = std::min(lo, x);
      hi = std::max(hi, x);
    }
    if (hi - lo >= sets)
      for (uint32_t t = gm; t; t &= t - 1) {
        uint32_t x = uint32_t(addr[g + uint32_t(__builtin_ctz(t))]) >> shift, s = x & (sets - 1), j = 0;
        while (j < n[s] && seen[s][j] != x) ++j;
        if (j == n[s]) {
          seen[s][j] = x;
          n[s] = uint8_t(j + 1);
          worst = std::max<uint32_t>(worst, j + 1);
        }
      }
    c.wavefronts += worst;
  }
}

// The constant cache serves one address at a time.
void count_constant(Warp& w, uint32_t m, const uint64_t* addr) {
  uint64_t seen[32];
  uint32_t n = 0;
  for (uint32_t t = m; t; t &= t - 1) {
    uint64_t x = addr[__builtin_ctz(t)];
    if (std::find(seen, seen + n, x) == seen + n) seen[n++] = x;
  }
  w.wk->count.constant_wavefronts += n;
}

// --- modules ----------------------------------------------------------------------------------------------

Module* load_module(const char* ptx, size_t size, std::string* error) {
  auto m = std::make_unique<Module>();
  while (size && ptx[size - 1] == '\0') --size;
  m->ast.text.assign(ptx, size);
  m->ast.text.push_back('\n');
  if (!parse_ptx(m->ast, error)) return nullptr;
  // storage of module variables (and of static .global variables declared inside functions)
  std::vector<const AVar*> vars;
  for (auto& v : m->ast.vars) vars.push_back(&v);
  for (auto& f : m->ast.functions)
    for (auto& v : f.vars) vars.push_back(&v);
  for (auto* v : vars) {
    if (v->space != Space::global && v->space != Space::constant) continue;
    if (v->external) continue;
    size_t n = std::max<size_t>(v->size, 1), al = std::max<size_t>(v->align, 16);
    auto mem = std::make_unique<uint8_t[]>(n + al + 64);
    uint64_t base = (uint64_t(mem.get()) + al - 1) / al * al;
    m->var_address[v->name] = base;
    m->ranges.push_back({base, base + n});
    register_allocation(reinterpret_cast<void*>(base), n);
    m->storage.push_back(std::move(mem));
  }
  for (auto* v : vars) {
    if (v->space != Space::global && v->space != Space::constant) continue;
    auto it = m->var_address.find(v->name);
    if (it == m->var_address.end()) continue;
    uint8_t* p = reinterpret_cast<uint8_t*>(it->second);
    uint8_t* end = p + v->size;
    for (auto& in : v->init) {
      uint64_t x = in.value;
      if (!in.symbol.empty()) {
        auto s = m->var_address.find(in.symbol);
        auto f = m->ast.func_index.find(in.symbol);
        if (s != m->var_address.end())
          x = s->second;
        else if (f != m->ast.func_index.end())
          x = kFunctionWindow + 16 * (f->second + 1);
        x += uint64_t(in.addend);
        if (in.mask_shift) x = (x & in.mask_shift) >> __builtin_ctzll(in.mask_shift);
      }
      if (p + in.width > end) break;
      memcpy(p, &x, std::min<size_t>(in.width, 8));
      p += in.width;
    }
  }
  for (auto& f : m->ast.functions)
    if (f.is_entry && f.has_body) {
      auto k = std::make_unique<Kernel>();
      k->module = m.get();
      k->ast = &f;
      k->name = std::string(f.name);
      m->kernels.push_back(std::move(k));
    }
  return m.release();
}

void unload_module(Module* m) {
  if (!m) return;
  for (auto& r : m->ranges) unregister_allocation(reinterpret_cast<void*>(r.base));
  delete m;
}

Kernel* find_kernel(Module* m, const char* name) {
  for (auto& k : m->kernels)
    if (k->name == name) return k.get();
  return nullptr;
}

std::vector<std::string> kernel_names(const Module* m) {
  std::vector<std::string> v;
  for (auto& k : m->kernels) v.push_back(k->name);
  return v;
}

KernelInfo kernel_info(const Kernel* kc) {
  Kernel* k = const_cast<Kernel*>(kc);
  KernelInfo i;
  {
    std::lock_guard<std::mutex> lock(k->mutex);
    if (!k->image) k->image.reset(decode_kernel(k->module, k->ast, nullptr));
  }
  for (auto& p : k->ast->params) {
    i.param_sizes.push_back(uint32_t(p.size));
    i.param_aligns.push_back(p.align);
  }
  i.static_shared_bytes = k->image->static_shared;
  for (auto& v : k->ast->vars)
    if (v.space == Space::local) i.local_bytes += uint32_t(v.size);
  i.registers_estimate = uint32_t(k->ast->regs.size());
  for (auto& f : k->image->functions) i.instructions += uint32_t(f.ast->body.size());
  if (k->ast->reqntid) i.max_threads = k->ast->reqntid;
  if (k->ast->maxntid) i.max_threads = k->ast->maxntid;
  return i;
}

void* find_global(Module* m, const char* name, size_t* size) {
  auto it = m->var_address.find(name);
  if (it == m->var_address.end()) return nullptr;
  auto v = m->ast.var_index.find(name);
  if (size) *size = v == m->ast.var_index.end() ? 0 : m->ast.vars[v->second].size;
  return reinterpret_cast<void*>(it->second);
}

}  // namespace cudasim
