// Operands while a function is decoded: registers, constants, special registers, symbols and labels.
#include "decode.h"
#include "lanes.h"

namespace cudasim {

static int storage_bytes(int size) {  // bytes of one register across the warp
  switch (size) {
    case 0:
      return 32;  // predicate mask (padded)
    case 1:
    case 2:
      return 64;
    case 4:
      return 128;
    case 8:
      return 256;
    default:
      return 512;
  }
}
uint32_t Decoder::alloc(int size) {
  uint32_t o = top_;
  top_ += uint32_t(storage_bytes(size));
  return o;
}
uint32_t Decoder::scratch(int size) { return alloc(size); }

uint32_t Decoder::constant(uint64_t v, int size) {
  if (size == 1) size = 2;
  if (size == 2) v &= 0xffff;
  if (size == 4) v &= 0xffffffffu;
  auto [it, fresh] = const_slots_.try_emplace({v, size}, 0);
  if (fresh) {
    it->second = alloc(size);
    fn->consts.push_back({it->second, uint8_t(size), v});
  }
  return it->second;
}
uint32_t Decoder::special(Special s, int size, int64_t addend) {
  auto [it, fresh] = spec_slots_.try_emplace({int(s), size, addend}, 0);
  if (fresh) {
    it->second = alloc(size);
    fn->specials.push_back({it->second, uint8_t(size), s, addend});
  }
  return it->second;
}

bool Decoder::is_special(std::string_view n, Special* s, int* size) const {
  static const std::unordered_map<std::string_view, std::pair<Special, int>> table = [] {
    std::unordered_map<std::string_view, std::pair<Special, int>> t;
    using S = Special;
    auto xyz = [&](const char* x, const char* y, const char* z, S s0) {
      t[x] = {s0, 4};
      t[y] = {S(int(s0) + 1), 4};
      t[z] = {S(int(s0) + 2), 4};
    };
    xyz("%tid.x", "%tid.y", "%tid.z", S::tid_x);
    xyz("%ntid.x", "%ntid.y", "%ntid.z", S::ntid_x);
    xyz("%ctaid.x", "%ctaid.y", "%ctaid.z", S::ctaid_x);
    xyz("%nctaid.x", "%nctaid.y", "%nctaid.z", S::nctaid_x);
    xyz("%clusterid.x", "%clusterid.y", "%clusterid.z", S::clusterid_x);
    xyz("%nclusterid.x", "%nclusterid.y", "%nclusterid.z", S::nclusterid_x);
    xyz("%cluster_ctaid.x", "%cluster_ctaid.y", "%cluster_ctaid.z", S::cluster_ctaid_x);
    xyz("%cluster_nctaid.x", "%cluster_nctaid.y", "%cluster_nctaid.z", S::cluster_nctaid_x);
    t["%cluster_ctarank"] = {S::cluster_ctarank, 4};
    t["%cluster_nctarank"] = {S::cluster_nctarank, 4};
    t["%is_explicit_cluster"] = {S::is_explicit_cluster, 0};
    t["%laneid"] = {S::laneid, 4};
    t["%warpid"] = {S::warpid, 4};
    t["%nwarpid"] = {S::nwarpid, 4};
    t["%smid"] = {S::smid, 4};
    t["%nsmid"] = {S::nsmid, 4};
    t["%gridid"] = {S::gridid, 8};
    t["%lanemask_eq"] = {S::lanemask_eq, 4};
    t["%lanemask_le"] = {S::lanemask_le, 4};
    t["%lanemask_lt"] = {S::lanemask_lt, 4};
    t["%lanemask_ge"] = {S::lanemask_ge, 4};
    t["%lanemask_gt"] = {S::lanemask_gt, 4};
    t["%clock"] = {S::clock, 4};
    t["%clock_hi"] = {S::clock_hi, 4};
    t["%clock64"] = {S::clock64, 8};
    t["%globaltimer"] = {S::globaltimer, 8};
    t["%globaltimer_lo"] = {S::globaltimer_lo, 4};
    t["%globaltimer_hi"] = {S::globaltimer_hi, 4};
    t["%dynamic_smem_size"] = {S::dynamic_smem_size, 4};
    t["%total_smem_size"] = {S::total_smem_size, 4};
    t["%aggr_smem_size"] = {S::aggr_smem_size, 4};
    t["%reserved_smem_offset_begin"] = {S::zero32, 4};
    t["%reserved_smem_offset_end"] = {S::zero32, 4};
    t["%reserved_smem_offset_cap"] = {S::zero32, 4};
    t["%reserved_smem_offset_0"] = {S::zero32, 4};
    t["%reserved_smem_offset_1"] = {S::zero32, 4};
    t["%current_graph_exec"] = {S::zero64, 8};
    return t;
  }();
  auto it = table.find(n);
  if (it == table.end()) {
    if (n.substr(0, 7) == "%envreg") {
      *s = n == "%envreg1"   ? Special::grid_workspace_hi
           : n == "%envreg2" ? Special::grid_workspace_lo
                             : Special::zero32;
      *size = 4;
      return true;
    }
    if (n.substr(0, 3) == "%pm") {
      *s = n.size() > 3 && n.substr(n.size() - 3) == "_64" ? Special::zero64 : Special::zero32;
      *size = *s == Special::zero64 ? 8 : 4;
      return true;
    }
    return false;
  }
  *s = it->second.first;
  *size = it->second.second;
  return true;
}

uint8_t Decoder::reg_size(const AOperand& o) const {
  if (o.kind == AOperand::reg) return slots_[o.reg_id].size;
  if (o.kind == AOperand::special) {
    Special s;
    int size;
    if (is_special(o.name, &s, &size)) return uint8_t(size);
  }
  return 0;
}

Decoder::Sym Decoder::symbol(const AOperand& o) const {
  Sym r;
  if (o.var_id >= 0) {
    const AVar& v = ast->vars[o.var_id];
    r.space = v.space;
    r.kind = v.space == Space::local ? Sym::local : v.space == Space::param ? Sym::param : Sym::address;
    if (v.space == Space::shared)
      r.value = kSharedBase + image->shared_layout.at(&v) + o.imm;
    else if (v.space == Space::global || v.space == Space::constant) {
      auto it = module->var_address.find(v.name);
      if (it == module->var_address.end()) return {};
      r.value = it->second + o.imm;
    } else
      r.value = var_offset_[o.var_id] + o.imm;
    return r;
  }
  auto f = formal_offset_.find(o.name);
  if (f != formal_offset_.end()) {
    r.kind = Sym::param;
    r.space = Space::param;
    r.value = f->second + o.imm;
    return r;
  }
  auto v = module->ast.var_index.find(o.name);
  if (v != module->ast.var_index.end()) {
    const AVar& var = module->ast.vars[v->second];
    r.kind = Sym::address;
    r.space = var.space;
    if (var.space == Space::shared)
      r.value = kSharedBase + image->shared_layout.at(&var) + o.imm;
    else {
      auto it = module->var_address.find(o.name);
      if (it == module->var_address.end()) return {};
      r.value = it->second + o.imm;
    }
    return r;
  }
  auto fi = module->ast.func_index.find(o.name);
  if (fi != module->ast.func_index.end()) {
    r.kind = Sym::function;
    r.value = kFunctionWindow + 16 * (fi->second + 1);
  }
  return r;
}

uint32_t Decoder::src(const AOperand& o, int size, Ty t) {
  switch (o.kind) {
    case AOperand::reg: {
      Slot s = slots_[o.reg_id];
      int want = size == 1 ? 2 : size;
      if (s.size != want) throw Unsupported{"register width does not match the instruction type"};
      if (o.neg) throw Unsupported{"negated register operand"};
      return s.offset;
    }
    case AOperand::num: {
      uint64_t v = uint64_t(o.imm);
      if (ty_float(t)) {
        if (t == Ty::f32 && o.imm_float == 64)
          v = bits<uint32_t>(float(bits<double>(o.imm)));
        else if (t == Ty::f64 && o.imm_float == 32)
          v = bits<uint64_t>(double(bits<float>(uint32_t(o.imm))));
        else if (t == Ty::f64 && o.imm_float == 0)
          v = bits<uint64_t>(double(o.imm));
        else if (t == Ty::f32 && o.imm_float == 0)
          v = bits<uint32_t>(float(o.imm));
      } else if (o.imm_float == 64 && size == 4)
        v = bits<uint32_t>(float(bits<double>(o.imm)));
      return constant(v, size);
    }
    case AOperand::special: {
      Special s;
      int sz;
      if (!is_special(o.name, &s, &sz)) throw Unsupported{"unknown special register " + std::string(o.name)};
      if (sz != size) {
        // 32-bit specials may be read through a narrower or wider move
        if (sz == 4 && size == 8) return special(s, 8);
        if (sz == 4 && size == 2) return special(s, 2);
        if (sz == 8 && size == 4) return special(s, 4);
        throw Unsupported{"special register width"};
      }
      return special(s, sz);
    }
    case AOperand::sym: {
      Sym y = symbol(o);
      if (y.kind == Sym::none) throw Unsupported{"unknown symbol " + std::string(o.name)};
      if (y.kind == Sym::local) return special(Special::local_base, size, int64_t(y.value));
      if (y.kind == Sym::param) {
        if (ast->is_entry && o.var_id < 0) return special(Special::param_base, size, int64_t(y.value));
        return special(Special::pmem_base, size, int64_t(y.value));
      }
      if (y.space == Space::shared) return special(Special::shared_base, size, int64_t(y.value));
      return constant(y.value, size);
    }
    case AOperand::sink:
      return alloc(size);
    default:
      throw Unsupported{"operand kind"};
  }
}

uint32_t Decoder::dst(const AOperand& o, int size) {
  if (o.kind == AOperand::sink) return alloc(size);
  if (o.kind != AOperand::reg) throw Unsupported{"destination is not a register"};
  Slot s = slots_[o.reg_id];
  if (s.size != (size == 1 ? 2 : size)) throw Unsupported{"destination width does not match the instruction type"};
  written.emplace_back(uint32_t(fn->code.size()), s.offset);
  return s.offset;
}
uint32_t Decoder::pred(const AOperand& o, bool* neg) {
  *neg = o.neg;
  if (o.kind == AOperand::num) return constant(o.imm ? FULL : 0, 0);
  if (o.kind == AOperand::special) {
    Special s;
    int size;
    if (is_special(o.name, &s, &size) && size == 0) return special(s, 0);
  }
  if (o.kind != AOperand::reg || slots_[o.reg_id].size != 0) throw Unsupported{"predicate operand expected"};
  return slots_[o.reg_id].offset;
}
uint32_t Decoder::pred_dst(const AOperand& o) {
  if (o.kind == AOperand::sink) return alloc(0);
  if (o.kind != AOperand::reg || slots_[o.reg_id].size != 0) throw Unsupported{"predicate destination expected"};
  return slots_[o.reg_id].offset;
}

// Index of the instruction that a label precedes.
uint32_t Decoder::label(std::string_view name, int scope) const {
  for (int s = scope; s >= 0; s = ast->scope_parent[s])
    for (auto& l : ast->labels)
      if (l.scope == s && l.name == name) return l.index;
  // a label inside a nested scope that this one can't see: accept a unique match
  const ALabel* found = nullptr;
  for (auto& l : ast->labels)
    if (l.name == name) {
      if (found) return NONE;
      found = &l;
    }
  return found ? found->index : NONE;
}

Function* Decoder::function_for(std::string_view name) {
  auto it = module->ast.func_index.find(name);
  if (it == module->ast.func_index.end()) return nullptr;
  const AFunction* a = &module->ast.functions[it->second];
  auto f = image->by_ast.find(a);
  return f == image->by_ast.end() ? nullptr : f->second;
}

}  // namespace cudasim
