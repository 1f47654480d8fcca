// Instructions that nvcc seldom emits, from hand-written PTX.
#include "harness.h"

using namespace test;
using cudasim::Fault;

void handwritten() {
  current = "handwritten";
  static const char text[] = R"(
.version 8.6
.target sm_90
.address_size 64
.global .align 16 .b32 cell[4] = {7, 8, -1, 0x10};
.global .align 8 .u64 ptrs[2] = {generic(cell), generic(cell)+4};
.global .f32 fl[2] = {1.5, 0f40000000};
.visible .entry odd(.param .u64 out, .param .u32 n)
{
  .reg .pred %p<8>;
  .reg .b16 %h<8>;
  .reg .b32 %r<40>;
  .reg .b64 %rd<20>;
  .reg .b128 %q<3>;
  .reg .f32 %f<10>;
  ld.param.u64 %rd1, [out];
  ld.param.u32 %r1, [n];
  mov.u32 %r2, %tid.x;
  mul.wide.u32 %rd2, %r2, 256;
  add.s64 %rd3, %rd1, %rd2;
  // jump table
  and.b32 %r3, %r2, 3;
table: .branchtargets L0, L1, L2, L3;
  brx.idx %r3, table;
L0: mov.u32 %r4, 100; bra.uni JOIN;
L1: mov.u32 %r4, 101; bra.uni JOIN;
L2: mov.u32 %r4, 102; bra.uni JOIN;
L3: mov.u32 %r4, 103;
JOIN:
  st.global.u32 [%rd3], %r4;
  // 96-bit addition with carries: {-1, -1, tid} + {1, 0, 5}
  mov.u32 %r5, 0xffffffff;
  add.cc.u32 %r6, %r5, 1;
  addc.cc.u32 %r7, %r5, 0;
  addc.u32 %r8, %r2, 5;
  st.global.v2.u32 [%rd3+8], {%r6, %r7};
  st.global.u32 [%rd3+4], %r8;
  sub.cc.u32 %r6, %r2, 1;
  subc.u32 %r7, 0, 0;
  st.global.u32 [%rd3+16], %r7;
  mad.lo.cc.u32 %r6, %r5, 2, 2;
  madc.hi.u32 %r7, %r5, 2, 0;
  st.global.u32 [%rd3+20], %r7;
  bfind.u32 %r6, %r2;
  bfind.shiftamt.s32 %r7, -8;
  st.global.v2.u32 [%rd3+24], {%r6, %r7};
  szext.clamp.s32 %r6, 0xf5, 4;
  bmsk.clamp.b32 %r7, 4, 8;
  st.global.v2.u32 [%rd3+32], {%r6, %r7};
  fns.b32 %r6, 0xf0f0, 0, 3;
  dp2a.lo.s32.u32 %r7, 0x00020003, 0x0000ff05, 1;
  st.global.v2.u32 [%rd3+40], {%r6, %r7};
  { .reg .b32 %r6; .reg .pred p; mov.u32 %r6, 77; setp.eq.u32 p, %r6, 77; @p bra INNER; mov.u32 %r6, 0; INNER: st.global.u32 [%rd3+48], %r6; }
  { .reg .b32 %r6; .reg .pred p; mov.u32 %r6, 78; setp.ne.u32 p, %r6, 78; @p bra INNER; add.u32 %r6, %r6, 1; INNER: st.global.u32 [%rd3+52], %r6; }
  setp.lt.u32 %p1, %r2, 16;
  setp.gt.and.s32 %p2|%p3, %r2, 7, !%p1;
  selp.u32 %r6, 1, 0, %p2;
  selp.u32 %r7, 1, 0, %p3;
  st.global.v2.u32 [%rd3+56], {%r6, %r7};
  set.gt.u32.u32 %r6, %r2, 3;
  set.le.f32.s32 %f1, %r2, 3;
  mov.b32 %r7, %f1;
  st.global.v2.u32 [%rd3+64], {%r6, %r7};
  sad.s32 %r6, %r2, 10, 1000;
  mul24.lo.s32 %r7, 0xffffff, 3;
  st.global.v2.u32 [%rd3+72], {%r6, %r7};
  prmt.b32.f4e %r6, 0x03020100, 0x07060504, %r2;
  prmt.b32.ecl %r7, 0x03020100, 0, %r2;
  st.global.v2.u32 [%rd3+80], {%r6, %r7};
  ld.global.u64 %rd4, [ptrs+8];
  ld.u32 %r6, [%rd4];
  ld.global.u64 %rd5, [ptrs];
  ld.u32 %r7, [%rd5+12];
  st.global.v2.u32 [%rd3+88], {%r6, %r7};
  mov.b64 %rd6, {%r2, 9};
  mov.b128 %q1, {%rd6, %rd6};
  mov.b128 {%rd7, %rd8}, %q1;
  st.global.v2.u64 [%rd3+96], {%rd7, %rd8};
  mov.f32 %f2, 0f3f000000;
  atom.global.v2.f32.add {%f3, %f4}, [%rd3+96], {%f2, %f2};
  testp.subnormal.f32 %p4, 0f00000001;
  testp.infinite.f32 %p5, 0fff800000;
  and.pred %p6, %p4, %p5;
  selp.u32 %r6, 5, 6, %p6;
  copysign.f32 %f5, -1.0, 2.5;
  mov.b32 %r7, %f5;
  st.global.v2.u32 [%rd3+112], {%r6, %r7};
  cvt.pack.sat.u8.s32.b32 %r6, 300, -5, 0x1234;
  isspacep.global %p1, %rd3;
  selp.u32 %r7, 3, 4, %p1;
  st.global.v2.u32 [%rd3+120], {%r6, %r7};
  ld.global.f32 %f6, [fl];
  ld.global.f32 %f7, [fl+4];
  add.f32 %f6, %f6, %f7;
  cvt.rzi.s32.f32 %r6, %f6;
  cvt.rni.ftz.sat.f32.f32 %f8, %f6;
  mov.b32 %r7, %f8;
  st.global.v2.u32 [%rd3+128], {%r6, %r7};
  cvt.u8.s32 %r6, 511;
  cvt.s8.s32 %r7, 0x1ff;
  st.global.v2.u32 [%rd3+136], {%r6, %r7};
  shf.l.wrap.b32 %r6, 0x80000000, 1, 33;
  shf.r.clamp.b32 %r7, 5, 0xffff0000, 40;
  st.global.v2.u32 [%rd3+144], {%r6, %r7};
  slct.u32.s32 %r6, 11, 22, -1;
  cnot.b32 %r7, 0;
  st.global.v2.u32 [%rd3+152], {%r6, %r7};
  ret;
}
)";
  std::string err;
  cudasim::Module* m = cudasim::load_module(text, sizeof text, &err);
  if (!check(m != nullptr, err)) return;
  {
    Buf<uint32_t> o(32 * 64);
    uint64_t out = uint64_t(o.p);
    uint32_t n = 3;
    void* args[] = {&out, &n};
    cudasim::LaunchConfig lc;
    lc.block.x = 32;
    lc.args = args;
    ok(cudasim::launch(cudasim::find_kernel(m, "odd"), lc));
    for (uint32_t t : {0u, 5u, 18u, 31u}) {
      auto is = [&](int word, uint32_t want) {
        check(o[t * 64 + word] == want, "thread " + std::to_string(t) + " word " + std::to_string(word) + ": got " +
                                            std::to_string(o[t * 64 + word]) + ", want " + std::to_string(want));
      };
      is(0, 100 + t % 4);
      is(1, t + 6);
      is(2, 0);
      is(3, 0);
      is(4, t == 0 ? 0xffffffffu : 0);
      is(5, 2);  // 0xffffffff * 2 = 0x1fffffffe: low + 2 carries, high is 1
      is(6, t ? 31 - __builtin_clz(t) : 0xffffffffu);
      is(7, 29);
      is(8, 5);
      is(9, 0xff0);
      is(10, 6);
      is(11, 3 * 5 + 2 * 255 + 1);
      is(12, 77);
      is(13, 79);
      is(14, t >= 16);
      is(15, t <= 7 && t >= 16);
      is(16, t > 3 ? 0xffffffffu : 0);
      is(17, t <= 3 ? 0x3f800000u : 0);
      is(18, 1000 + (t > 10 ? t - 10 : 10 - t));
      is(19, uint32_t(-3));
      uint32_t f4 = 0, ecl = 0;
      for (uint32_t k = 0; k < 4; ++k) {
        f4 |= (t % 4 + k) << (8 * k);
        ecl |= std::max(t % 4, k) << (8 * k);
      }
      is(20, f4);
      is(21, ecl);
      is(22, 8);
      is(23, 16);
      float a, b;
      uint32_t half = 0x3f000000u, ub = 9;
      memcpy(&a, &t, 4);
      memcpy(&b, &ub, 4);
      float hf;
      memcpy(&hf, &half, 4);
      float sa = a + hf, sb = b + hf;
      uint32_t ua, ubb;
      memcpy(&ua, &sa, 4);
      memcpy(&ubb, &sb, 4);
      is(24, ua);
      is(25, ubb);
      is(26, t);
      is(27, 9);
      is(28, 5);
      is(29, 0xc0200000u);
      is(30, 0x1234u << 16 | 255 << 8 | 0);
      is(31, 3);
      is(32, 3);
      is(33, 0x3f800000u);
      is(34, 255);
      is(35, 0xffffffffu);
      is(36, 3);
      is(37, 0xffff0000u);
      is(38, 22);
      is(39, 1);
    }
  }
  cudasim::unload_module(m);
  check(cudasim::load_module("garbage", 7, &err) == nullptr && !err.empty(), "malformed text is refused");
  static const char unknown[] =
      ".version 8.0\n.target sm_90\n.address_size 64\n.visible .entry k(.param .u32 n)\n{ .reg .b32 %r<3>; .reg .pred "
      "%p; ld.param.u32 %r1, [n]; setp.eq.u32 %p, %r1, 0; @%p ret; frobnicate.b32 %r2, %r1; ret; }\n";
  m = cudasim::load_module(unknown, sizeof unknown - 1, &err);
  if (!check(m != nullptr, "unknown instructions parse: " + err)) return;
  for (uint32_t n : {0u, 1u}) {
    void* args[] = {&n};
    cudasim::LaunchConfig lc;
    lc.args = args;
    auto r = cudasim::launch(cudasim::find_kernel(m, "k"), lc);
    check(r.fault == (n ? Fault::unsupported_instruction : Fault::none), "fault only when executed: " + r.message);
    if (n) check(r.message.find("frobnicate.b32 %r2, %r1") != std::string::npos, "message names the instruction");
  }
  cudasim::unload_module(m);
}
