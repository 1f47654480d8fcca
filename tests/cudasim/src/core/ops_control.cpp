// Branches, calls, exits and the device runtime functions (printf, assert).
#include "access.h"
#include "select.h"

namespace cudasim {

namespace {

// --- branches and calls ---------------------------------------------------------------------------------------------

void bra(Warp& w, const Op& o, uint32_t m) {
  if (m == w.active) {
    w.pc = uint32_t(o.imm);
    return;
  }
  w.park(w.active & ~m, w.pc);
  w.park(m, uint32_t(o.imm));
  w.ev |= EV_RESCHED | EV_PARKED;
}
void brx(Warp& w, const Op& o, uint32_t m) {
  const uint32_t* idx = w.r<uint32_t>(o.a);
  w.park(w.active & ~m, w.pc);
  for (uint32_t t = m; t; t &= t - 1) {
    int l = __builtin_ctz(t);
    if (idx[l] >= o.ext->table.size())
      fault(Fault::trap, l, "brx.idx index " + std::to_string(idx[l]) + " is outside the branch table");
    w.lane_pc[l] = o.ext->table[idx[l]];
    w.lane_frame[l] = w.frame;
  }
  w.ev |= EV_RESCHED | EV_PARKED;
}

// ext: v[0] argument offsets, v[1] return offsets in the caller's .param memory
void enter_function(Warp& w, const Op& o, uint32_t m, const Function* callee) {
  Frame* caller = w.frame;
  Frame* f = w.enter(caller, callee);
  const AFunction& a = *callee->ast;
  if (o.ext->v[0].size() != a.params.size()) fault(Fault::internal, -1, "call with a wrong number of arguments");
  for (uint32_t t = m; t; t &= t - 1) {
    uint32_t l = uint32_t(__builtin_ctz(t));
    for (size_t i = 0; i < a.params.size(); ++i)
      memcpy(f->pmem + l * callee->param_bytes + callee->param_offset[i],
             caller->pmem + l * caller->fn->param_bytes + o.ext->v[0][i], a.params[i].size);
    f->ret_pc[l] = w.pc;
    w.lane_pc[l] = 0;
    w.lane_frame[l] = f;
  }
}
void call(Warp& w, const Op& o, uint32_t m) {
  w.park(w.active & ~m, w.pc);
  enter_function(w, o, m, o.ext->callee);
  w.ev |= EV_RESCHED | EV_PARKED;
}
void call_indirect(Warp& w, const Op& o, uint32_t m) {
  const uint64_t* target = w.r<uint64_t>(o.a);
  w.park(w.active & ~m, w.pc);
  const KernelImage& img = *w.blk->ls->image;
  for (uint32_t left = m; left;) {
    int l = __builtin_ctz(left);
    uint64_t v = target[l];
    uint32_t same = 0;
    for (uint32_t t = left; t; t &= t - 1) {
      int k = __builtin_ctz(t);
      if (target[k] == v) same |= 1u << k;
    }
    left &= ~same;
    const Function* callee = nullptr;
    if ((v & kWindowMask) == kFunctionWindow) {
      uint64_t i = (v - kFunctionWindow) / 16 - 1;
      auto& fs = w.blk->ls->kernel->module->ast.functions;
      if (i < fs.size()) {
        auto it = img.by_ast.find(&fs[i]);
        if (it != img.by_ast.end()) callee = it->second;
      }
    }
    if (!callee) fault(Fault::trap, l, "indirect call through " + hex(v) + ", which is not a function");
    enter_function(w, o, same, callee);
  }
  w.ev |= EV_RESCHED | EV_PARKED;
}
void exit_op(Warp& w, const Op&, uint32_t m) {
  w.park(w.active & ~m, w.pc);
  w.ev |= EV_RESCHED | EV_PARKED;
  w.exit_lanes(m);
}
void ret(Warp& w, const Op& o, uint32_t m) {
  Frame* f = w.frame;
  if (!f->parent) {
    exit_op(w, o, m);
    return;
  }
  w.park(w.active & ~m, w.pc);
  Frame* p = f->parent;
  const Function* fn = f->fn;
  for (uint32_t t = m; t; t &= t - 1) {
    uint32_t l = uint32_t(__builtin_ctz(t));
    const Op& c = p->fn->code[f->ret_pc[l] - 1];
    for (size_t i = 0; i < fn->ast->returns.size() && i < c.ext->v[1].size(); ++i)
      memcpy(p->pmem + l * p->fn->param_bytes + c.ext->v[1][i], f->pmem + l * fn->param_bytes + fn->return_offset[i],
             fn->ast->returns[i].size);
    w.lane_pc[l] = f->ret_pc[l];
    w.lane_frame[l] = p;
  }
  w.ev |= EV_RESCHED | EV_PARKED;
}
void trap(Warp&, const Op& o, uint32_t m) { fault(Fault::trap, __builtin_ctz(m), o.flags ? "brkpt" : "trap"); }
void nanosleep(Warp& w, const Op&, uint32_t) { w.ev |= EV_YIELD_BLOCK; }
void nothing(Warp&, const Op&, uint32_t) {}

// --- device runtime ------------------------------------------------------------------------------------------------

uint8_t* arg(Warp& w, const Op& o, int lane, size_t i) {
  return w.frame->pmem + uint32_t(lane) * w.frame->fn->param_bytes + o.ext->v[0][i];
}

std::string format_printf(Warp& w, int lane, const std::string& fmt, uint64_t args) {
  std::string out;
  uint64_t at = args;
  auto fetch = [&](int bytes) {
    at = (at + uint64_t(bytes) - 1) / uint64_t(bytes) * uint64_t(bytes);
    uint64_t v = 0;
    memcpy(&v, generic_pointer(w, lane, at, uint32_t(bytes), Access::read), size_t(bytes));
    at += uint64_t(bytes);
    return v;
  };
  for (size_t i = 0; i < fmt.size(); ++i) {
    if (fmt[i] != '%') {
      out += fmt[i];
      continue;
    }
    std::string spec = "%";
    size_t j = i + 1;
    int longs = 0;
    for (; j < fmt.size() && !isalpha((unsigned char)fmt[j]) && fmt[j] != '%'; ++j) {
      if (fmt[j] == '*')
        spec += std::to_string(int32_t(fetch(4)));
      else
        spec += fmt[j];
    }
    while (j < fmt.size() && (fmt[j] == 'l' || fmt[j] == 'h' || fmt[j] == 'z' || fmt[j] == 'j' || fmt[j] == 't')) {
      longs += fmt[j] == 'l' || fmt[j] == 'z' || fmt[j] == 'j' || fmt[j] == 't';
      ++j;
    }
    if (j >= fmt.size()) {
      out += fmt.substr(i);
      break;
    }
    char c = fmt[j], buf[512];
    switch (c) {
      case '%':
        out += '%';
        break;
      case 'd':
      case 'i':
        if (longs)
          snprintf(buf, sizeof buf, (spec + "lld").c_str(), (long long)fetch(8));
        else
          snprintf(buf, sizeof buf, (spec + "d").c_str(), int32_t(fetch(4)));
        out += buf;
        break;
      case 'u':
      case 'x':
      case 'X':
      case 'o':
        if (longs)
          snprintf(buf, sizeof buf, (spec + "ll" + c).c_str(), (unsigned long long)fetch(8));
        else
          snprintf(buf, sizeof buf, (spec + c).c_str(), uint32_t(fetch(4)));
        out += buf;
        break;
      case 'c':
        snprintf(buf, sizeof buf, (spec + "c").c_str(), int(fetch(4)));
        out += buf;
        break;
      case 'p':
        snprintf(buf, sizeof buf, "0x%llx", (unsigned long long)fetch(8));
        out += buf;
        break;
      case 's': {
        std::string s = generic_string(w, lane, fetch(8));
        std::vector<char> big(s.size() + 300);
        snprintf(big.data(), big.size(), (spec + "s").c_str(), s.c_str());
        out += big.data();
        break;
      }
      case 'f':
      case 'F':
      case 'e':
      case 'E':
      case 'g':
      case 'G':
      case 'a':
      case 'A': {
        uint64_t v = fetch(8);
        double dv;
        memcpy(&dv, &v, 8);
        snprintf(buf, sizeof buf, (spec + c).c_str(), dv);
        out += buf;
        break;
      }
      default:
        out += fmt.substr(i, j - i + 1);
    }
    i = j;
  }
  return out;
}
void call_vprintf(Warp& w, const Op& o, uint32_t m) {
  static std::mutex mutex;
  std::string all;
  for (uint32_t t = m; t; t &= t - 1) {
    int l = __builtin_ctz(t);
    uint64_t fmt, args;
    memcpy(&fmt, arg(w, o, l, 0), 8);
    memcpy(&args, arg(w, o, l, 1), 8);
    all += format_printf(w, l, generic_string(w, l, fmt), args);
    if (!o.ext->v[1].empty()) {
      int32_t n = 0;
      memcpy(w.frame->pmem + uint32_t(l) * w.frame->fn->param_bytes + o.ext->v[1][0], &n, 4);
    }
  }
  std::lock_guard<std::mutex> lock(mutex);
  fwrite(all.data(), 1, all.size(), stdout);
  fflush(stdout);
}
void call_assertfail(Warp& w, const Op& o, uint32_t m) {
  int l = __builtin_ctz(m);
  uint64_t msg, file, func;
  uint32_t line;
  memcpy(&msg, arg(w, o, l, 0), 8);
  memcpy(&file, arg(w, o, l, 1), 8);
  memcpy(&line, arg(w, o, l, 2), 4);
  memcpy(&func, arg(w, o, l, 3), 8);
  fault(Fault::trap, l,
        "assertion failed: " + generic_string(w, l, msg) + " at " + generic_string(w, l, file) + ":" +
            std::to_string(line) + " in " + generic_string(w, l, func));
}

bool sel_call(Decoder& d, const AInstr& in, Op& op) {
  op.cls = C_control;
  OpExt& e = d.ext(op);
  size_t i = 0;
  auto params = [&](const AOperand& list, std::vector<uint32_t>& out) {
    for (auto& x : list.elems) {
      Decoder::Sym s = x.kind == AOperand::sym ? d.symbol(x) : Decoder::Sym();
      if (s.kind != Decoder::Sym::param) throw Decoder::Unsupported{"call argument that is not a .param variable"};
      out.push_back(uint32_t(s.value));
    }
  };
  if (i < in.ops.size() && in.ops[i].kind == AOperand::list) params(in.ops[i++], e.v[1]);
  if (i >= in.ops.size()) return false;
  const AOperand& target = in.ops[i++];
  if (i < in.ops.size() && in.ops[i].kind == AOperand::list) params(in.ops[i++], e.v[0]);
  if (target.kind == AOperand::reg) {
    op.a = d.src(target, 8);
    return done(op, call_indirect);
  }
  if (target.kind != AOperand::sym) return false;
  if (target.name == "vprintf") return done(op, call_vprintf);
  if (target.name == "__assertfail" || target.name == "__assert_fail") return done(op, call_assertfail);
  e.callee = d.function_for(target.name);
  if (!e.callee) throw Decoder::Unsupported{"call of undefined function " + std::string(target.name)};
  return done(op, call);
}

bool sel_bra(Decoder& d, const AInstr& in, Op& op) {
  op.cls = C_control;
  if (in.mods[0] == "brx") {
    if (in.ops.size() != 2) return false;
    op.a = d.src(in.ops[0], 4);
    OpExt& e = d.ext(op);
    for (int s = in.ops[1].scope; s >= 0; s = d.ast->scope_parent[size_t(s)])
      for (auto& t : d.ast->tables)
        if (t.scope == s && t.name == in.ops[1].name && e.table.empty())
          for (auto n : t.targets) e.table.push_back(d.label(n, t.scope));
    if (e.table.empty()) return false;
    for (auto t : e.table)
      if (t == NONE) throw Decoder::Unsupported{"unknown label in a branch table"};
    return done(op, brx);
  }
  if (in.ops.size() != 1 || in.ops[0].kind != AOperand::sym) return false;
  uint32_t l = d.label(in.ops[0].name, in.ops[0].scope);
  if (l == NONE) throw Decoder::Unsupported{"unknown label " + std::string(in.ops[0].name)};
  op.imm = l;
  op.flags = 0x80000000u;
  return done(op, bra);
}

}  // namespace

void register_control(SelectorMap& m) {
  m["bra"] = m["brx"] = sel_bra;
  m["call"] = sel_call;
  m["ret"] = [](Decoder&, const AInstr&, Op& op) {
    op.cls = C_control;
    return done(op, ret);
  };
  m["exit"] = [](Decoder&, const AInstr&, Op& op) {
    op.cls = C_control;
    return done(op, exit_op);
  };
  m["trap"] = [](Decoder&, const AInstr&, Op& op) {
    op.cls = C_control;
    return done(op, trap);
  };
  m["brkpt"] = [](Decoder&, const AInstr&, Op& op) {
    op.cls = C_control;
    op.flags = 1;
    return done(op, trap);
  };
  m["nanosleep"] = [](Decoder&, const AInstr&, Op& op) {
    op.cls = C_control;
    return done(op, nanosleep);
  };
  m["pmevent"] = [](Decoder&, const AInstr&, Op& op) {
    op.cls = C_control;
    return done(op, nothing);
  };
}

}  // namespace cudasim
