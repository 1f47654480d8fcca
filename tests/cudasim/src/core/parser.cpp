// Recursive-descent parser for PTX text.
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "ast.h"

namespace cudasim {
namespace {

bool ident_start(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || c == '$' || c == '%';
}
bool digit(char c) { return c >= '0' && c <= '9'; }
bool ident_char(char c) { return ident_start(c) || digit(c); }

struct ParseError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Parser {
 public:
  explicit Parser(AModule& m) : m_(m), p_(m.text.data()), end_(p_ + m.text.size()) {}

  void run() {
    while (skip(), p_ < end_) top_level();
  }
  uint32_t line() const { return line_; }

 private:
  AModule& m_;
  const char* p_;
  const char* end_;
  uint32_t line_ = 1;

  // State of the function being parsed.
  AFunction* f_ = nullptr;
  struct Scope {
    int32_t id;
    std::unordered_map<std::string_view, int32_t> regs;
    struct Range {
      int32_t first;
      uint32_t count;
    };
    std::unordered_map<std::string_view, Range> ranges;
    std::unordered_map<std::string_view, int32_t> vars;
  };
  std::vector<Scope> scopes_;

  [[noreturn]] void fail(const std::string& what) { throw ParseError("line " + std::to_string(line_) + ": " + what); }

  // --- lexing ---------------------------------------------------------------------------------
  void skip() {
    while (p_ < end_) {
      char c = *p_;
      if (c == '\n') {
        ++line_;
        ++p_;
      } else if (c == ' ' || c == '\t' || c == '\r' || c == '\0')
        ++p_;
      else if (c == '/' && p_ + 1 < end_ && p_[1] == '/') {
        while (p_ < end_ && *p_ != '\n') ++p_;
      } else if (c == '/' && p_ + 1 < end_ && p_[1] == '*') {
        p_ += 2;
        while (p_ + 1 < end_ && !(p_[0] == '*' && p_[1] == '/')) {
          if (*p_ == '\n') ++line_;
          ++p_;
        }
        p_ += 2;
      } else if (c == '#') {
        while (p_ < end_ && *p_ != '\n') ++p_;
      } else
        break;
    }
  }
  char peek() {
    skip();
    return p_ < end_ ? *p_ : '\0';
  }
  bool accept(char c) {
    if (peek() == c) {
      ++p_;
      return true;
    }
    return false;
  }
  void expect(char c) {
    if (!accept(c)) fail(std::string("expected '") + c + "' near '" + near() + "'");
  }
  std::string near() { return std::string(p_, std::min<size_t>(24, end_ - p_)); }

  // A dotted word: directive or opcode with its qualifiers ("ld.shared::cta.v4.f32", ".reg").
  std::string_view dotted() {
    skip();
    const char* s = p_;
    while (p_ < end_ && (ident_char(*p_) || *p_ == '.' || (*p_ == ':' && p_ + 1 < end_ && p_[1] == ':') ||
                         (*p_ == ':' && p_ > s && p_[-1] == ':')))
      ++p_;
    return {s, size_t(p_ - s)};
  }
  std::string_view ident() {
    skip();
    const char* s = p_;
    if (p_ < end_ && ident_start(*p_))
      while (p_ < end_ && ident_char(*p_)) ++p_;
    if (s == p_) fail("expected a name near '" + near() + "'");
    return {s, size_t(p_ - s)};
  }
  bool accept_word(std::string_view w) {
    skip();
    if (size_t(end_ - p_) >= w.size() && memcmp(p_, w.data(), w.size()) == 0 &&
        (p_ + w.size() == end_ || !ident_char(p_[w.size()]))) {
      p_ += w.size();
      return true;
    }
    return false;
  }
  void skip_to_semicolon() {
    while (p_ < end_ && *p_ != ';') {
      if (*p_ == '\n') ++line_;
      ++p_;
    }
    expect(';');
  }
  void skip_line() {
    while (p_ < end_ && *p_ != '\n') ++p_;
  }

  // --- numbers --------------------------------------------------------------------------------
  struct Number {
    int64_t value;
    uint8_t fp;
  };
  Number primary() {
    skip();
    if (accept('(')) {
      Number n = expression();
      expect(')');
      return n;
    }
    if (*p_ == '-') {
      ++p_;
      Number n = primary();
      return n.fp ? negate(n) : Number{-n.value, 0};
    }
    if (*p_ == '+') {
      ++p_;
      return primary();
    }
    if (*p_ == '~') {
      ++p_;
      Number n = primary();
      return {~n.value, 0};
    }
    if (*p_ == '!') {
      ++p_;
      Number n = primary();
      return {!n.value, 0};
    }
    if (!digit(*p_) && *p_ != '.') fail("expected a number near '" + near() + "'");
    if (p_[0] == '0' && (p_[1] == 'f' || p_[1] == 'F' || p_[1] == 'd' || p_[1] == 'D')) {
      bool dbl = p_[1] == 'd' || p_[1] == 'D';
      p_ += 2;
      uint64_t v = 0;
      int n = 0;
      while (p_ < end_ && isxdigit((unsigned char)*p_) && n < (dbl ? 16 : 8)) {
        v = v * 16 + hex(*p_++);
        ++n;
      }
      return {int64_t(v), uint8_t(dbl ? 64 : 32)};
    }
    const char* q = p_;
    bool is_hex = p_[0] == '0' && (p_[1] == 'x' || p_[1] == 'X');
    if (!is_hex) {
      while (q < end_ && digit(*q)) ++q;
      if (q < end_ && (*q == '.' || *q == 'e' || *q == 'E')) {
        char* e;
        double d = strtod(p_, &e);
        p_ = e;
        int64_t bits;
        memcpy(&bits, &d, 8);
        return {bits, 64};
      }
    }
    uint64_t v = 0;
    if (is_hex) {
      p_ += 2;
      while (p_ < end_ && isxdigit((unsigned char)*p_)) v = v * 16 + hex(*p_++);
    } else if (p_[0] == '0' && (p_[1] == 'b' || p_[1] == 'B')) {
      p_ += 2;
      while (*p_ == '0' || *p_ == '1') v = v * 2 + (*p_++ - '0');
    } else if (p_[0] == '0' && digit(p_[1])) {
      while (digit(*p_)) v = v * 8 + (*p_++ - '0');
    } else
      while (p_ < end_ && digit(*p_)) v = v * 10 + (*p_++ - '0');
    if (p_ < end_ && *p_ == 'U') ++p_;
    return {int64_t(v), 0};
  }
  static Number negate(Number n) {
    n.value ^= n.fp == 64 ? int64_t(1ull << 63) : int64_t(1ull << 31);
    return n;
  }
  static int hex(char c) { return digit(c) ? c - '0' : (c | 32) - 'a' + 10; }
  Number expression() {  // constant expressions: + - * / % << >> & | ^, no precedence subtleties needed
    Number a = primary();
    for (;;) {
      skip();
      char c = *p_;
      if (c == '<' && p_[1] == '<') {
        p_ += 2;
        a.value <<= primary().value;
      } else if (c == '>' && p_[1] == '>') {
        p_ += 2;
        a.value = int64_t(uint64_t(a.value) >> primary().value);
      } else if (c == '+') {
        ++p_;
        a.value += primary().value;
      } else if (c == '-') {
        ++p_;
        a.value -= primary().value;
      } else if (c == '*') {
        ++p_;
        a.value *= primary().value;
      } else if (c == '/') {
        ++p_;
        auto b = primary().value;
        if (b) a.value /= b;
      } else if (c == '%') {
        ++p_;
        auto b = primary().value;
        if (b) a.value %= b;
      } else if (c == '&') {
        ++p_;
        a.value &= primary().value;
      } else if (c == '|') {
        ++p_;
        a.value |= primary().value;
      } else if (c == '^') {
        ++p_;
        a.value ^= primary().value;
      } else
        return a;
    }
  }
  int64_t integer() { return expression().value; }

  // --- module scope ---------------------------------------------------------------------------
  void top_level() {
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
  void parse_target() {
    const char* s = p_;
    skip_line();
    std::string_view t(s, p_ - s);
    size_t i = t.find("sm_");
    if (i != t.npos) m_.target = atoi(std::string(t.substr(i + 3, 4)).c_str());
  }
  void skip_section() {
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

  static Space space_of(std::string_view d) {
    if (d == ".global" || d == ".tex") return Space::global;
    if (d == ".const") return Space::constant;
    if (d == ".shared") return Space::shared;
    if (d == ".local") return Space::local;
    if (d == ".param") return Space::param;
    return Space::none;
  }

  // ".align 8 .b8 name[24]" and friends, after the space directive.
  AVar variable(Space space, bool ext) {
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
  void initializer(AVar& v, uint8_t width) {
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
  void addend(AVar::Init& in) {
    skip();
    if (*p_ == '+') {
      ++p_;
      in.addend += integer();
    } else if (*p_ == '-') {
      in.addend += integer();
    }
  }
  void module_variable(std::string_view d, bool ext) {
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

  // --- functions ------------------------------------------------------------------------------
  void param_list(std::vector<AVar>& out) {
    expect('(');
    if (accept(')')) return;
    do {
      std::string_view d = dotted();
      if (d == ".reg") {  // .reg parameters (hand-written PTX) behave as .param for our purposes
        out.push_back(variable(Space::param, false));
      } else if (d == ".param") {
        out.push_back(variable(Space::param, false));
      } else
        fail("expected .param, found '" + std::string(d) + "'");
    } while (accept(','));
    expect(')');
  }
  void function(bool entry) {
    AFunction fn;
    fn.is_entry = entry;
    skip_attributes();
    if (!entry && peek() == '(') param_list(fn.returns);
    fn.name = ident();
    if (peek() == '(') param_list(fn.params);
    for (;;) {
      if (peek() != '.') break;
      std::string_view d = dotted();
      if (d == ".maxntid" || d == ".reqntid") {
        uint32_t n = uint32_t(integer());
        while (accept(',')) n *= uint32_t(integer());
        (d == ".maxntid" ? fn.maxntid : fn.reqntid) = n;
      } else if (d == ".reqnctapercluster") {
        fn.cluster[0] = uint32_t(integer());
        fn.cluster[1] = fn.cluster[2] = 1;
        for (int i = 1; i < 3 && accept(','); ++i) fn.cluster[i] = uint32_t(integer());
      } else if (d == ".minnctapersm" || d == ".maxnreg" || d == ".maxnctapersm" || d == ".maxclusterrank") {
        integer();
      } else if (d == ".explicitcluster" || d == ".noreturn" || d == ".blocksareclusters") {
      } else if (d == ".unified" || d == ".attribute") {
        if (accept('(')) {
          while (p_ < end_ && *p_ != ')') ++p_;
          expect(')');
        }
      } else if (d == ".pragma") {
        skip_to_semicolon();
      } else if (d == ".abi_preserve" || d == ".abi_preserve_control") {
        integer();
      } else
        fail("unknown function directive " + std::string(d));
    }
    auto it = m_.func_index.find(fn.name);
    if (accept(';')) {
      if (it == m_.func_index.end()) {
        m_.func_index[fn.name] = uint32_t(m_.functions.size());
        m_.functions.push_back(std::move(fn));
      }
      return;
    }
    AFunction* slot;
    if (it == m_.func_index.end()) {
      m_.func_index[fn.name] = uint32_t(m_.functions.size());
      m_.functions.push_back(std::move(fn));
      slot = &m_.functions.back();
    } else {
      slot = &m_.functions[it->second];
      if (slot->has_body) slot = nullptr;
    }
    AFunction scratch;  // second definition of the same (weak) function: parsed and dropped
    AFunction& f = slot ? (it == m_.func_index.end() ? *slot : (*slot = std::move(fn))) : scratch;
    f.has_body = true;
    f_ = &f;
    expect('{');
    open_scope();
    body();
    scopes_.clear();
    f_ = nullptr;
  }
  void skip_attributes() {
    while (peek() == '.') {
      std::string_view d = dotted();
      if (d == ".attribute" && accept('(')) {
        while (p_ < end_ && *p_ != ')') ++p_;
        expect(')');
      }
    }
  }
  void open_scope() {
    Scope s;
    s.id = int32_t(f_->scope_parent.size());
    f_->scope_parent.push_back(scopes_.empty() ? -1 : scopes_.back().id);
    scopes_.push_back(std::move(s));
  }

  void body() {
    int depth = 1;
    while (depth > 0) {
      char c = peek();
      if (c == '\0') fail("unexpected end of text inside a function");
      if (c == '}') {
        ++p_;
        --depth;
        scopes_.pop_back();
        continue;
      }
      if (c == '{') {
        ++p_;
        ++depth;
        open_scope();
        continue;
      }
      if (c == ';') {
        ++p_;
        continue;
      }
      if (c == '.') {
        body_directive();
        continue;
      }
      if (c == '@') {
        instruction();
        continue;
      }
      // label or instruction
      const char* s = p_;
      uint32_t l = line_;
      if (ident_start(c)) {
        std::string_view n = ident();
        if (peek() == ':' && p_[1] != ':') {
          ++p_;
          label(n);
          continue;
        }
      }
      p_ = s;
      line_ = l;
      instruction();
    }
  }
  void label(std::string_view n) {
    if (peek() == '.') {
      const char* s = p_;
      uint32_t l = line_;
      std::string_view d = dotted();
      if (d == ".callprototype" || d == ".calltargets") {
        skip_to_semicolon();
        return;
      }
      if (d == ".branchtargets") {
        ABranchTable t{n, scopes_.back().id, {}};
        do t.targets.push_back(ident());
        while (accept(','));
        expect(';');
        f_->tables.push_back(std::move(t));
        return;
      }
      p_ = s;
      line_ = l;
    }
    f_->labels.push_back({n, scopes_.back().id, uint32_t(f_->body.size())});
  }
  void body_directive() {
    std::string_view d = dotted();
    if (d == ".reg") {
      reg_decl();
      return;
    }
    if (d == ".local" || d == ".shared" || d == ".param" || d == ".global" || d == ".const") {
      do {
        AVar v = variable(space_of(d), false);
        scopes_.back().vars[v.name] = int32_t(f_->vars.size());
        f_->vars.push_back(std::move(v));
      } while (accept(','));
      expect(';');
      return;
    }
    if (d == ".loc" || d == ".file") {
      skip_line();
      return;
    }
    if (d == ".pragma") {
      skip_to_semicolon();
      return;
    }
    if (d == ".maxntid" || d == ".minnctapersm") {
      skip_line();
      return;
    }
    if (d == ".section") {
      skip_section();
      return;
    }
    fail("unknown directive " + std::string(d) + " in a function");
  }
  void reg_decl() {
    Ty t = Ty::none;
    uint32_t vec = 1;
    while (peek() == '.') {
      std::string_view d = dotted();
      if (d == ".v2")
        vec = 2;
      else if (d == ".v4")
        vec = 4;
      else
        t = parse_type(d.substr(1));
      if (t == Ty::none && vec == 1) fail("unknown register type " + std::string(d));
    }
    if (vec != 1) fail("vector register variables are not supported");
    do {
      std::string_view n = ident();
      int32_t first = int32_t(f_->regs.size());
      if (accept('<')) {
        uint32_t count = uint32_t(integer());
        expect('>');
        f_->regs.insert(f_->regs.end(), count, t);
        scopes_.back().ranges[n] = {first, count};
      } else {
        f_->regs.push_back(t);
        scopes_.back().regs[n] = first;
      }
    } while (accept(','));
    expect(';');
  }
  int32_t find_reg(std::string_view n) {
    size_t stem = n.size();
    while (stem > 0 && digit(n[stem - 1])) --stem;
    for (auto s = scopes_.rbegin(); s != scopes_.rend(); ++s) {
      auto r = s->regs.find(n);
      if (r != s->regs.end()) return r->second;
      if (stem < n.size() && !s->ranges.empty()) {
        auto g = s->ranges.find(n.substr(0, stem));
        if (g != s->ranges.end()) {
          uint32_t i = 0;
          for (size_t k = stem; k < n.size(); ++k) i = i * 10 + uint32_t(n[k] - '0');
          if (i < g->second.count) return g->second.first + int32_t(i);
        }
      }
    }
    return -1;
  }
  int32_t find_var(std::string_view n) {
    for (auto s = scopes_.rbegin(); s != scopes_.rend(); ++s) {
      auto v = s->vars.find(n);
      if (v != s->vars.end()) return v->second;
    }
    return -1;
  }

  // --- instructions ---------------------------------------------------------------------------
  void instruction() {
    f_->body.emplace_back();
    AInstr in;
    skip();
    const char* start = p_;
    in.line = line_;
    if (accept('@')) {
      in.pred_neg = accept('!');
      std::string_view n = ident();
      in.pred = find_reg(n);
      if (in.pred < 0) fail("unknown predicate " + std::string(n));
    }
    std::string_view op = dotted();
    if (op.empty()) fail("expected an instruction near '" + near() + "'");
    for (size_t i = 0; i <= op.size();) {
      size_t j = op.find('.', i);
      if (j == op.npos) j = op.size();
      in.mods.push_back(op.substr(i, j - i));
      i = j + 1;
    }
    if (peek() != ';') {
      do in.ops.push_back(operand());
      while (accept(','));
    }
    in.text = std::string_view(start, p_ - start);
    expect(';');
    f_->body.back() = std::move(in);
  }
  AOperand operand() {
    AOperand a = simple_operand();
    if (peek() == '|') {
      AOperand pr;
      pr.kind = AOperand::pair;
      pr.elems.push_back(std::move(a));
      ++p_;
      pr.elems.push_back(simple_operand());
      return pr;
    }
    return a;
  }
  AOperand simple_operand() {
    AOperand a;
    a.scope = scopes_.back().id;
    char c = peek();
    if (c == '{') {
      ++p_;
      a.kind = AOperand::vec;
      if (accept('}')) return a;
      do a.elems.push_back(operand());
      while (accept(','));
      expect('}');
      return a;
    }
    if (c == '(') {
      const char* s = p_;
      uint32_t l = line_;
      ++p_;
      skip();
      if (*p_ == ')' || ident_start(*p_)) {
        a.kind = AOperand::list;
        if (accept(')')) return a;
        do a.elems.push_back(operand());
        while (accept(','));
        expect(')');
        return a;
      }
      // a parenthesised constant, or a call argument list that begins with a literal
      p_ = s;
      line_ = l;
      ++p_;
      a.kind = AOperand::list;
      do a.elems.push_back(operand());
      while (accept(','));
      expect(')');
      return a;
    }
    if (c == '[') {
      ++p_;
      a.kind = AOperand::addr;
      skip();
      if (ident_start(*p_)) {
        a.elems.push_back(name_operand());
        if (peek() == '+') {
          ++p_;
          a.imm = integer();
        } else if (peek() == '-')
          a.imm = integer();
        a.imm += a.elems[0].imm;
        a.elems[0].imm = 0;
      } else
        a.imm = integer();
      while (accept(',')) a.elems.push_back(operand());
      expect(']');
      return a;
    }
    if (c == '!') {
      ++p_;
      a = simple_operand();
      a.neg = true;
      return a;
    }
    if (c == '-') {
      const char* q = p_ + 1;
      while (q < end_ && (*q == ' ' || *q == '\t')) ++q;
      if (ident_start(*q)) {
        ++p_;
        a = simple_operand();
        a.neg = true;
        return a;
      }
    }
    if (ident_start(c)) {
      a = name_operand();
      if (a.kind == AOperand::sym && (peek() == '+' || peek() == '-')) {
        if (*p_ == '+') ++p_;
        a.imm += integer();
      }
      return a;
    }
    Number n = expression();
    a.kind = AOperand::num;
    a.imm = n.value;
    a.imm_float = n.fp;
    return a;
  }
  AOperand name_operand() {
    AOperand a;
    a.scope = scopes_.back().id;
    std::string_view n = ident();
    if (n == "_") {
      a.kind = AOperand::sink;
      return a;
    }
    a.reg_id = find_reg(n);
    a.name = n;
    if (a.reg_id >= 0) {
      a.kind = AOperand::reg;
      return a;
    }
    if (n[0] == '%') {
      const char* s = n.data();
      while (p_ < end_ && (*p_ == '.' && p_ + 1 < end_ && ident_start(p_[1]))) {
        ++p_;
        while (p_ < end_ && ident_char(*p_)) ++p_;
      }
      a.name = std::string_view(s, p_ - s);
      a.kind = AOperand::special;
      return a;
    }
    if (n == "WARP_SZ") {
      a.kind = AOperand::num;
      a.imm = 32;
      return a;
    }
    a.kind = AOperand::sym;
    a.var_id = find_var(n);
    return a;
  }
};

}  // namespace

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
