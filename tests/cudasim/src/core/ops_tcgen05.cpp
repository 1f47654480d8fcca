// tcgen05: tensor memory is allocated, read and written by warps (sm_100a). tensor_core.cpp has the products.
#include <algorithm>

#include "access.h"
#include "collective.h"
#include "select.h"
#include "shadow.h"
#include "tensor_memory.h"

namespace cudasim {

namespace {

// --- allocation ---------------------------------------------------------------------------------------------------

uint32_t column_count(uint32_t columns) {
  if (columns < 32 || columns > TensorMemory::kColumns || columns & (columns - 1))
    fault(Fault::tensor_memory, -1,
          "allocation of " + std::to_string(columns) + " columns, which is not a power of two from 32 to 512");
  return columns;
}

// op: a, size2, imm the address that receives the result; b columns; size the state space
void allocate(Warp& w, const Op& o, uint32_t m) {
  if (!whole_warp(w, m)) return;
  Block& b = *w.blk;
  if (b.ls->arch != 100)
    fault(Fault::unsupported_instruction, -1, "sm_" + std::to_string(b.ls->arch) + " has no tensor memory");
  if (!b.tensor_memory) b.tensor_memory = std::make_unique<TensorMemory>(b.ls->check_init);
  const int l = __builtin_ctz(m);
  const uint32_t columns = column_count(w.r<uint32_t>(o.b)[l]);
  if (!b.tensor_memory->permit) fault(Fault::tensor_memory, -1, "tcgen05.alloc after tcgen05.relinquish_alloc_permit");
  const uint32_t first = b.tensor_memory->allocate(w, columns);
  if (first == TensorMemory::kColumns)
    fault(Fault::tensor_memory, -1,
          "tcgen05.alloc of " + std::to_string(columns) +
              " columns, for which the block's own allocations leave no room");
  uint64_t addr[32];
  uint8_t *ptr[32], *data[32];
  fill_addresses(w, o, addr);
  data[l] = reinterpret_cast<uint8_t*>(const_cast<uint32_t*>(&first));
  resolve(w, 1u << l, Space(o.size), addr, 4, Access::write, ptr, true);
  check_shadow(w, 1u << l, Space(o.size), addr, 4, Access::write, false, ptr, data);
  memcpy(ptr[l], &first, 4);
}
void deallocate(Warp& w, const Op& o, uint32_t m) {
  if (!whole_warp(w, m)) return;
  const int l = __builtin_ctz(m);
  const uint32_t address = w.r<uint32_t>(o.a)[l], columns = column_count(w.r<uint32_t>(o.b)[l]);
  TensorMemory& t = tensor_memory(*w.blk);
  for (const PendingTensorWork& p : w.blk->group->tensor_work)
    if (!p.commit && w.blk->rank - p.first < p.pair && uses_columns(p, address & 0xffff, columns))
      fault(Fault::tensor_memory, -1,
            "tcgen05.dealloc of columns that the tcgen05.mma at PTX line " + std::to_string(p.line) +
                " uses: wait for its tcgen05.commit");
  t.release(w, address & 0xffff, columns);
}
void relinquish(Warp& w, const Op&, uint32_t m) {
  if (whole_warp(w, m)) tensor_memory(*w.blk).permit = false;
}

// --- tcgen05.ld and .st -------------------------------------------------------------------------------------------

enum Shape : uint8_t { S32x32, S16x64, S16x128, S16x256, S16x32x2 };
enum : uint32_t { T_STORE = 1, T_HALVES = 2 };  // halves: registers hold the lower halves of two columns each

// op: size the shape, d repetitions, c the second half's column of .16x32bx2; ext v[0] registers
TensorArea area_of(const Op& o, uint32_t address) {
  static const uint32_t columns[] = {1, 2, 4, 8, 1};
  const uint32_t each = o.flags & T_HALVES ? 2 : 1;
  return {address >> 16, o.size == S32x32 ? 32u : 16u, address & 0xffff, columns[o.size] * o.d * each};
}
// The area of the upper lanes of .16x32bx2 begins in another column.
template <class F>
void each_area(const Op& o, uint32_t address, F f) {
  f(area_of(o, address));
  if (o.size == S16x32x2 && o.c) f(area_of(o, address + o.c));
}
// Calls f(register, lane of the warp, lane, column): register j of thread t holds one element.
template <class F>
void each_element(const Op& o, uint32_t address, F f) {
  const uint32_t lane0 = address >> 16, column0 = address & 0xffff, each = o.flags & T_HALVES ? 2 : 1;
  for (uint32_t j = 0; j < o.ext->v[0].size(); ++j)
    for (uint32_t t = 0; t < 32; ++t) {
      uint32_t lane = t, column = j, offset = 0;
      switch (o.size) {
        case S16x64:
          lane = t / 4 + 8 * (t & 1);
          column = (t >> 1 & 1) + 2 * j;
          break;
        case S16x128:
          lane = t / 4 + 8 * (j & 1);
          column = (t & 3) + 4 * (j >> 1);
          break;
        case S16x256:
          lane = t / 4 + 8 * (j >> 1 & 1);
          column = 2 * (t & 3) + (j & 1) + 8 * (j >> 2);
          break;
        case S16x32x2:
          lane = t & 15;
          offset = t < 16 ? 0 : o.c;
          break;
      }
      f(j, t, lane0 + lane, column0 + column * each + offset);
    }
}

void load(Warp& w, const PendingTensorAccess& p) {
  TensorMemory& t = tensor_memory(*w.blk);
  each_element(*p.op, p.address, [&](uint32_t j, uint32_t l, uint32_t lane, uint32_t column) {
    uint32_t value = t.read(lane, column);
    if (p.op->flags & T_HALVES) value = (value & 0xffff) | t.read(lane, column + 1) << 16;
    reinterpret_cast<uint32_t*>(p.frame->regs + p.op->ext->v[0][j])[l] = value;
  });
}
void store(Warp& w, const PendingTensorAccess& p) {
  TensorMemory& t = tensor_memory(*w.blk);
  each_element(*p.op, p.address, [&](uint32_t j, uint32_t l, uint32_t lane, uint32_t column) {
    const uint32_t value = p.values[32 * j + l];
    if (p.op->flags & T_HALVES) {
      t.write(lane, column, value & 0xffff);
      t.write(lane, column + 1, value >> 16);
    } else
      t.write(lane, column, value);
  });
}

void finish(Warp& w, std::vector<PendingTensorAccess>& pending, bool write) {
  for (const PendingTensorAccess& p : pending) {
    if (!p.done) (write ? store : load)(w, p);
    each_area(*p.op, p.address, [&](const TensorArea& a) { w.blk->tensor_memory->end(w, a, write, p.op->src->line); });
  }
  pending.clear();
}

void access(Warp& w, const Op& o, uint32_t m) {
  if (!whole_warp(w, m)) return;
  if (m != FULL) fault(Fault::tensor_memory, -1, "tcgen05.ld or tcgen05.st in a warp of fewer than 32 threads");
  uint64_t addr[32];
  fill_addresses(w, o, addr);
  const auto address = uint32_t(addr[0]);
  for (int l = 1; l < 32; ++l)
    if (addr[l] != addr[0])
      fault(Fault::tensor_memory, l,
            "the thread's address in tensor memory, " + hex(addr[l]) + ", differs from the first thread's, " +
                hex(address));
  const uint32_t lane = address >> 16, own = 32 * (w.index & 3);
  if (lane != own && (o.size == S32x32 || lane != own + 16))
    fault(Fault::tensor_memory, -1,
          "access to tensor memory from lane " + std::to_string(lane) + " on, but warp " + std::to_string(w.index) +
              " reaches lanes " + std::to_string(own) + " to " + std::to_string(own + 31));
  const bool write = o.flags & T_STORE;
  TensorMemory& t = tensor_memory(*w.blk);
  each_area(o, address, [&](const TensorArea& a) { t.begin(w, a, write, o.src->line); });
  PendingTensorAccess p;
  p.op = &o;
  p.frame = w.frame;
  p.address = address;
  if (write)
    for (const uint32_t reg : o.ext->v[0]) p.values.insert(p.values.end(), w.r<uint32_t>(reg), w.r<uint32_t>(reg) + 32);
  auto& pending = write ? w.tensor_stores : w.tensor_loads;
  pending.push_back(std::move(p));
  if (!write && !w.wk->ls->check_fence) return finish(w, pending, write);
  if (write && w.wk->ls->seeded && w.wk->random(4) == 0) {
    store(w, pending.back());
    pending.back().done = true;
  }
}

// flags: T_STORE
void wait(Warp& w, const Op& o, uint32_t m) {
  if (!whole_warp(w, m)) return;
  const bool write = o.flags & T_STORE;
  finish(w, write ? w.tensor_stores : w.tensor_loads, write);
}

// flags: 1 after_thread_sync
void fence(Warp& w, const Op& o, uint32_t) { note_tensor_fence(w, o.flags & 1); }

// --- selection ----------------------------------------------------------------------------------------------------

bool select_access(Decoder& d, const AInstr& in, Op& op) {
  static const char* const shapes[] = {"32x32b", "16x64b", "16x128b", "16x256b", "16x32bx2"};
  static const uint32_t registers[] = {1, 1, 2, 4, 1};  // of each repetition
  const bool write = in.mods[1] == "st";
  int shape = -1;
  for (int i = 0; i < 5; ++i)
    if (has(in, shapes[i])) shape = i;
  for (const auto q : in.mods)
    if (q.size() > 1 && q[0] == 'x' && isdigit(q[1])) op.d = uint32_t(atoi(std::string(q.substr(1)).c_str()));
  const bool split = shape == S16x32x2;
  if (shape < 0 || !op.d || has(in, "red") || in.ops.size() != (split ? 3u : 2u)) return false;
  op.size = uint8_t(shape);
  op.flags = (write ? T_STORE : 0u) | (has(in, "pack::16b") || has(in, "unpack::16b") ? T_HALVES : 0u);
  address_operand(d, in.ops[write ? 0 : 1], op);
  if (split) {
    const AOperand& half = in.ops[write ? 1 : 2];
    if (half.kind != AOperand::num) return false;
    op.c = uint32_t(half.imm);
  }
  OpExt& e = d.ext(op);
  const AOperand& r = in.ops[write ? in.ops.size() - 1 : 0];
  const auto add = [&](const AOperand& x) { e.v[0].push_back(write ? d.src(x, 4) : d.dst(x, 4)); };
  if (r.kind == AOperand::vec)
    for (const AOperand& x : r.elems) add(x);
  else
    add(r);
  if (e.v[0].size() != op.d * registers[shape]) throw Decoder::Unsupported{"number of registers"};
  return done(op, access);
}

bool select_tcgen05(Decoder& d, const AInstr& in, Op& op) {
  op.cls = C_other;
  if (in.mods.size() < 2) return false;
  const std::string_view k = in.mods[1];
  if (k == "ld" || k == "st") return select_access(d, in, op);
  if (k == "mma" || k == "commit") return select_tensor_mma(d, in, op);
  if (k == "alloc") {
    address_operand(d, in.ops[0], op);
    op.b = d.src(in.ops[1], 4);
    op.size = uint8_t(space_of(in));
    return done(op, allocate);
  }
  if (k == "dealloc") {
    op.a = d.src(in.ops[0], 4);
    op.b = d.src(in.ops[1], 4);
    return done(op, deallocate);
  }
  if (k == "relinquish_alloc_permit") return done(op, relinquish);
  op.cls = C_barrier;
  if (k == "wait::ld" || k == "wait::st") {
    op.flags = k == "wait::st" ? T_STORE : 0;
    return done(op, wait);
  }
  if (k == "fence::before_thread_sync" || k == "fence::after_thread_sync") {
    op.flags = k == "fence::after_thread_sync";
    return done(op, fence);
  }
  throw Decoder::Unsupported{"tcgen05." + std::string(k) + " is not simulated"};
}

}  // namespace

TensorMemory& tensor_memory(Block& b) {
  if (!b.tensor_memory) fault(Fault::tensor_memory, -1, "access to tensor memory, of which nothing is allocated");
  return *b.tensor_memory;
}

void register_tcgen05(SelectorMap& m) { m["tcgen05"] = select_tcgen05; }

}  // namespace cudasim
