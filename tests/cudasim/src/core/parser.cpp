// Module scope: directives, variables and their initializers.
#include "parser.h"

namespace cudasim {

// --- module scope ---------------------------------------------------------------------------

void Parser::top_level() {
  if (accept(';')) return;
  if (peek() != '.') fail("unexpected text '" + near() + "'");
  bool ext = false;
  for (;;) {
    std::string_view d = dotted();
    if (d == ".version") {
      skip_line();
      return;
    }
    if (d == ".target") {
      parse_target();
      return;
    }
    if (d == ".address_size") {
      integer();
      return;
    }
    if (d == ".file" || d == ".loc" || d == ".alias") {
      if (d == ".alias")
        skip_to_semicolon();
      else
        skip_line();
      return;
    }
    if (d == ".section") {
      skip_section();
      return;
    }
    if (d == ".pragma") {
      skip_to_semicolon();
      return;
    }
    if (d == ".extern" || d == ".visible" || d == ".weak" || d == ".common") {
      if (d == ".extern") ext = true;
      continue;
    }
    if (d == ".entry" || d == ".func") {
      function(d == ".entry");
      return;
    }
    if (d == ".global" || d == ".const" || d == ".shared" || d == ".tex") {
      module_variable(d, ext);
      return;
    }
    if (d.empty()) fail("unexpected text '" + near() + "'");
    fail("unknown directive " + std::string(d));
  }
}
void Parser::parse_target() {
  const char* s = p_;
  skip_line();
  std::string_view t(s, p_ - s);
  size_t i = t.find("sm_");
  if (i != t.npos) m_.target = atoi(std::string(t.substr(i + 3, 4)).c_str());
}
void Parser::skip_section() {
  while (p_ < end_ && *p_ != '{') {
    if (*p_ == '\n') ++line_;
    ++p_;
  }
  int depth = 0;
  while (p_ < end_) {
    if (*p_ == '\n') ++line_;
    if (*p_ == '{') ++depth;
    if (*p_ == '}' && --depth == 0) {
      ++p_;
      return;
    }
    ++p_;
  }
}
Space Parser::space_of(std::string_view d) {
  if (d == ".global" || d == ".tex") return Space::global;
  if (d == ".const") return Space::constant;
  if (d == ".shared") return Space::shared;
  if (d == ".local") return Space::local;
  if (d == ".param") return Space::param;
  return Space::none;
}
// ".align 8 .b8 name[24]" and friends, after the space directive.
AVar Parser::variable(Space space, bool ext) {
  AVar v;
  v.space = space;
  v.external = ext;
  uint32_t vec = 1;
  bool has_align = false;
  for (;;) {
    if (peek() != '.') break;
    std::string_view d = dotted();
    if (d == ".align") {
      v.align = uint32_t(integer());
      has_align = true;
    } else if (d == ".v2")
      vec = 2;
    else if (d == ".v4")
      vec = 4;
    else if (d == ".ptr" || d == ".global" || d == ".const" || d == ".shared" || d == ".local" || d == ".space" ||
             d == ".attribute" || d == ".managed" || d == ".param") {
      if (d == ".attribute") {
        expect('(');
        while (p_ < end_ && *p_ != ')') ++p_;
        expect(')');
      }
    } else if (d == ".texref" || d == ".samplerref" || d == ".surfref") {
      v.type = Ty::u64;
    } else {
      v.type = parse_type(d.substr(1));
      if (v.type == Ty::none) fail("unknown type " + std::string(d));
    }
  }
  v.size = uint64_t(ty_size(v.type)) * vec;
  if (!has_align) v.align = uint32_t(v.size ? v.size : 1);
  // ".param .u64 .ptr .global .align 4 name" also lands here; the alignment is then the pointee's.
  if (space == Space::param && v.type != Ty::b8 && v.align < uint32_t(v.size)) v.align = uint32_t(v.size);
  v.name = peek() == '_' && !ident_char(p_[1]) ? (++p_, std::string_view("_")) : ident();
  uint64_t elem = v.size;
  bool unsized = false;
  while (accept('[')) {
    if (accept(']')) {
      unsized = true;
      continue;
    }
    v.size *= uint64_t(integer());
    expect(']');
  }
  if (unsized) v.size = 0;
  if (peek() == '<') {
    fail("parameterised variable not expected here");
  }
  if (accept('=')) {
    initializer(v, uint8_t(ty_size(v.type)));
    if (unsized) v.size = elem * v.init.size();
  }
  return v;
}
void Parser::initializer(AVar& v, uint8_t width) {
  if (accept('{')) {
    if (accept('}')) return;
    do {
      if (peek() == '}') break;
      initializer(v, width);
    } while (accept(','));
    expect('}');
    return;
  }
  AVar::Init in{0, width, {}, 0, false, 0};
  skip();
  // "0xFF00(sym)" selects a byte of an address; "generic(sym)" makes it generic.
  if (ident_start(*p_)) {
    std::string_view n = ident();
    if (n == "generic" && accept('(')) {
      in.generic = true;
      n = ident();
      in.symbol = n;
      addend(in);
      expect(')');
    } else if (n == "mask")
      fail("mask() initializers are not supported");
    else
      in.symbol = n;
    addend(in);
  } else {
    Number n = primary();
    if (peek() == '(' && n.fp == 0) {
      ++p_;
      in.symbol = ident();
      if (in.symbol == "generic" && accept('(')) {
        in.symbol = ident();
        in.generic = true;
        addend(in);
        expect(')');
      }
      addend(in);
      expect(')');
      in.mask_shift = uint64_t(n.value);
      in.width = 1;
    } else {
      for (;;) {  // rest of a constant expression
        skip();
        if (*p_ == '+') {
          ++p_;
          n.value += primary().value;
        } else if (*p_ == '-') {
          ++p_;
          n.value -= primary().value;
        } else
          break;
      }
      if (n.fp == 64 && width == 4) {
        double d;
        memcpy(&d, &n.value, 8);
        float fl = float(d);
        uint32_t b;
        memcpy(&b, &fl, 4);
        n.value = b;
      }
      in.value = uint64_t(n.value);
    }
  }
  v.init.push_back(in);
}
void Parser::addend(AVar::Init& in) {
  skip();
  if (*p_ == '+') {
    ++p_;
    in.addend += integer();
  } else if (*p_ == '-') {
    in.addend += integer();
  }
}
void Parser::module_variable(std::string_view d, bool ext) {
  do {
    AVar v = variable(space_of(d), ext);
    auto it = m_.var_index.find(v.name);
    if (it != m_.var_index.end()) {
      if (m_.vars[it->second].external || !ext) m_.vars[it->second] = v;
    } else {
      m_.var_index[v.name] = uint32_t(m_.vars.size());
      m_.vars.push_back(std::move(v));
    }
  } while (accept(','));
  expect(';');
}

bool parse_ptx(AModule& m, std::string* error) {
  Parser p(m);
  try {
    p.run();
    return true;
  } catch (const std::exception& e) {
    if (error) *error = std::string("PTX parse error: ") + e.what();
    return false;
  }
}

}  // namespace cudasim
