// What the simulator checks on Hopper besides races: registers, the lifetime of shared memory, proxies, and dependent
// launches. Each check has a right kernel, and the same kernel with one fault.
#include "harness.h"

using namespace test;
using cudasim::Fault;
using cudasim::LaunchResult;

namespace {

using After = std::shared_ptr<const cudasim::Unfinished>;
struct Shape {
  unsigned blocks = 1, threads = 32, cluster = 1, registers = 0;
};

// Runs a kernel with the parameters `in` and `out`, which %rd1 and %rd2 hold. %r1 is the thread's number, and %r2 the
// address of 1 KiB of shared memory, of which the last 8 bytes are for a barrier at %r3.
LaunchResult launch(const std::string& body, Shape shape, const void* in, const void* out, const After& after = {}) {
  const std::string text = R"(
.version 8.6
.target sm_90a
.address_size 64
.const .align 4 .b32 table[32];
.visible .entry k(.param .u64 in, .param .u64 out)
{
  .shared .align 1024 .b8 memory[1024];
  .reg .pred %p<4>;
  .reg .b16 %h<2>;
  .reg .b32 %r<20>;
  .reg .b64 %rd<10>;
  .reg .f32 %f<8>;
  ld.param.u64 %rd1, [in];
  ld.param.u64 %rd2, [out];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, memory;
  add.u32 %r3, %r2, 1016;
)" + body + "  ret;\n}\n";
  std::string error;
  cudasim::Module* m = cudasim::load_module(text.data(), text.size(), &error);
  if (!check(m != nullptr, error)) return {};
  cudasim::LaunchConfig c;
  c.grid.x = shape.blocks;
  c.block.x = shape.threads;
  c.cluster.x = shape.cluster;
  c.registers = shape.registers;
  c.after = after;
  void* args[] = {&in, &out};
  c.args = args;
  LaunchResult result = cudasim::launch(cudasim::find_kernel(m, "k"), c);
  cudasim::unload_module(m);
  return result;
}
void fails(const LaunchResult& r, Fault f, const char* text) {
  expect_fault(r, f);
  check(r.message.find(text) != std::string::npos, std::string("'") + text + "' is missing in: " + r.message);
}

void setmaxnreg() {
  current = "setmaxnreg";
  // The first warpgroup needs what the second one releases.
  const auto run = [](unsigned registers, const std::string& first, const std::string& second) {
    return launch("setp.ge.u32 %p1, %r1, 128;\n@%p1 bra SECOND;\nsetmaxnreg." + first +
                      ";\nbra DONE;\nSECOND:\nsetmaxnreg." + second + ";\nDONE:\n",
                  {1, 256, 1, registers}, nullptr, nullptr);
  };
  ok(run(136, "inc.sync.aligned.u32 232", "dec.sync.aligned.u32 40"));
  ok(run(0, "inc.sync.aligned.u32 232", "dec.sync.aligned.u32 40"));
  fails(run(128, "inc.sync.aligned.u32 232", "dec.sync.aligned.u32 40"), Fault::barrier_deadlock,
        "wait at registers, PTX line");
  fails(run(136, "inc.sync.aligned.u32 128", "dec.sync.aligned.u32 40"), Fault::registers, "inc to 128 registers");
  fails(run(136, "dec.sync.aligned.u32 40", "dec.sync.aligned.u32 144"), Fault::registers, "dec to 144 registers");
}

const std::string kClusterBarrier = "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n";

void distributed_shared_memory() {
  current = "distributed shared memory";
  Buf<uint32_t> out(64);
  const std::string rank = "mov.u32 %r4, %cluster_ctarank;\n";
  const std::string read = R"(
  xor.b32 %r5, %r4, 1;
  mapa.shared::cluster.u32 %r6, %r2, %r5;
  ld.shared::cluster.u32 %r7, [%r6];
)";
  const auto run = [&](bool begin, bool end, const std::string& only = "") {
    return launch(rank + "st.shared.u32 [%r2], 5;\n" + (begin ? kClusterBarrier : "") + only + read +
                      (end ? "DONE:\n" + kClusterBarrier : "DONE:\n"),
                  {2, 32, 2}, nullptr, out.p);
  };
  for (const char* checks : {"", "race", "race,init,grid"}) {
    Env c("CUDASIM_CHECK", checks);
    ok(run(true, true));
    fails(run(false, true), Fault::shared_lifetime, "may not have begun");
    fails(run(true, false), Fault::shared_lifetime, "has ended");
    // Only block 1 reads, before block 0 ends in this run. The race check knows that it need not be before.
    const LaunchResult one = run(true, false, "setp.eq.u32 %p1, %r4, 0;\n@%p1 bra DONE;\n");
    if (*checks)
      fails(one, Fault::shared_lifetime, "may end before block 1 of the cluster accesses");
    else
      ok(one);
  }
  const std::string copy = R"(
  setp.ne.u32 %p1, %r1, 0;
  @%p1 bra COPIED;
  mbarrier.init.shared::cta.b64 [%r3], 1;
  mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 64;
  cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd1], 64, [%r3];
COPIED:
  bar.sync 0;
)";
  const std::string wait = "WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], 0;\n@!%p2 bra WAIT;\n";
  ok(launch(copy + wait, {}, out.p, nullptr));
  fails(launch(copy, {}, out.p, nullptr), Fault::shared_lifetime, "in flight");
}

// Bits 24.. of a shared address are the rank of its block in the cluster, as on cards.
void ranks_in_addresses() {
  current = "ranks in addresses";
  Buf<uint32_t> out(4);
  const std::string rank = "mov.u32 %r4, %cluster_ctarank;\n";
  const std::string store = rank + kClusterBarrier + R"(
  mapa.shared::cluster.u32 %r6, %r2, 0;
  getctarank.shared::cluster.u32 %r7, %r2;
  sub.u32 %r5, %r2, %r6;
  mul.wide.u32 %rd3, %r4, 8;
  add.u64 %rd3, %rd2, %rd3;
  st.global.u32 [%rd3], %r5;
  st.global.u32 [%rd3+4], %r7;
)" + kClusterBarrier;
  ok(launch(store, {2, 32, 2}, nullptr, out.p));
  check(out[0] == 0 && out[1] == 0 && out[2] == 1u << 24 && out[3] == 1, "own addresses and those of mapa");

  // A descriptor of 8 rows of 128 bytes, swizzled.
  const auto wgmma = [](bool masked) {
    return std::string(masked ? "and.b32 %r5, %r2, 0x3FFFF;\n" : "mov.u32 %r5, %r2;\n") + R"(
  shr.u32 %r5, %r5, 4;
  cvt.u64.u32 %rd3, %r5;
  or.b64 %rd3, %rd3, 0x4000004000000000;
  mov.u32 %r4, 0;
  wgmma.fence.sync.aligned;
  wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f0, %f1, %f2, %f3}, {%r4, %r4, %r4, %r4}, %rd3, 0, 1, 1, 0;
  wgmma.commit_group.sync.aligned;
  wgmma.wait_group.sync.aligned 0;
)";
  };
  ok(launch(wgmma(true), {2, 128, 2}, nullptr, nullptr));
  ok(launch(wgmma(false), {2, 128, 1}, nullptr, nullptr));
  fails(launch(wgmma(false), {2, 128, 2}, nullptr, nullptr), Fault::shared_out_of_bounds, "masked with 0x3FFFF");
}

void wgmma_fence() {
  current = "wgmma.fence";
  const std::string begin = R"(
  mov.u64 %rd3, 0x8000000000000040;
  mov.u32 %r4, 1;
  add.u32 %r4, %r4, %r1;
  mov.f32 %f0, 0f00000000;
  mov.f32 %f1, 0f00000000;
  mov.f32 %f2, 0f00000000;
  mov.f32 %f3, 0f00000000;
)";
  const std::string fence = "wgmma.fence.sync.aligned;\n", change_a = "add.u32 %r4, %r4, 1;\n";
  const auto mma = [](const char* a) {
    return std::string("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f0, %f1, %f2, %f3}, {") + a +
           ", %r4, %r4, %r4}, %rd3, 1, 1, 1, 0;\n";
  };
  const std::string wait = "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n";
  const auto run = [&](const std::string& body) { return launch(begin + body, {1, 128}, nullptr, nullptr); };
  const std::string again = mma("%r4") + wait, change_sum = "add.f32 %f2, %f2, 0f3F800000;\n";
  ok(run(fence + mma("%r4") + again));
  ok(run(fence + again + change_sum + change_a + fence + again));
  ok(run(fence + "mov.b32 %r5, %r4;\n" + mma("%r5") + wait));  // ptxas removes such a copy
  fails(run(again), Fault::registers, "before the first wgmma.fence");
  fails(run(fence + change_a + again), Fault::registers, "written at PTX line");
  fails(run(fence + change_a + "mov.b32 %r5, %r4;\n" + mma("%r5") + wait), Fault::registers, "written at PTX line");
  fails(run(fence + again + change_sum + again), Fault::registers, "written at PTX line");
}

void proxy_of_writes() {
  current = "async proxy writes";
  Buf<uint32_t> in(16);
  const auto run = [&](const char* fence) {
    return launch(std::string(R"(
  setp.ne.u32 %p1, %r1, 0;
  @%p1 ret;
  mbarrier.init.shared::cta.b64 [%r3], 1;
  st.shared.u32 [%r2], 7;
)") + fence + R"(
  mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 64;
  cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd1], 64, [%r3];
WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], 0;
  @!%p2 bra WAIT;
)",
                  {}, in.p, nullptr);
  };
  Env c("CUDASIM_CHECK", "race,init");
  ok(run("fence.proxy.async.shared::cta;\n"));
  fails(run(""), Fault::shared_race, "the async proxy writes");
}

void counters() {
  current = "counters";
  Buf<uint32_t> in(128, 1), out(64);
  const auto constant = [&](const char* index) {
    const std::string load = std::string("mov.u64 %rd3, table;\nmul.wide.u32 %rd4, ") + index +
                             ", 4;\nadd.u64 %rd3, %rd3, %rd4;\nld.const.u32 %r5, [%rd3];\n";
    LaunchResult r = launch("and.b32 %r4, %r1, 3;\n" + load, {}, nullptr, nullptr);
    ok(r);
    return r.profile.constant_wavefronts;
  };
  check(constant("%r1") == 32 && constant("%r4") == 4 && constant("7") == 1, "addresses of constants");
  LaunchResult r = launch(R"(
  mul.wide.u32 %rd3, %r1, 16;
  add.u64 %rd3, %rd1, %rd3;
  mad.lo.u32 %r4, %r1, 16, %r2;
  cp.async.cg.shared.global [%r4], [%rd3], 16;
  cp.async.wait_all;
  ld.global.u32 %r5, [%rd3];
)",
                          {}, in.p, nullptr);
  ok(r);
  check(r.profile.global_sectors_read == 32 && r.profile.async_sectors_read == 16 &&
            r.profile.async_sectors_received == 16,
        "sectors of cp.async");
}

void dependent_launches() {
  current = "dependent launches";
  Env c("CUDASIM_CHECK", "race,init,grid");
  Buf<uint32_t> x(64), y(64);
  const std::string wait = "griddepcontrol.wait;\n", trigger = "griddepcontrol.launch_dependents;\n";
  const std::string address = "mul.wide.u32 %rd3, %r1, 4;\nadd.u64 %rd4, %rd1, %rd3;\nadd.u64 %rd5, %rd2, %rd3;\n";
  const std::string load = "ld.global.u32 %r4, [%rd4];\n", store = "st.global.u32 [%rd5], %r1;\n";
  const auto run = [&](const std::string& body, const After& after, unsigned threads = 32) {
    return launch(address + body, {1, threads}, x.p, y.p, after);
  };
  const LaunchResult first = launch(address + trigger + store, {1, 64}, nullptr, x.p);
  ok(first);
  ok(run(load, {}));  // not a dependent launch
  ok(run(wait + load, first.unfinished));
  fails(run(load + wait, first.unfinished), Fault::grid_race, "may still run before griddepcontrol.wait");
  fails(launch(address + store, {}, nullptr, x.p, first.unfinished), Fault::grid_race, "race between launches: write");

  // A compiler may move ld.global.nc before the wait, since nobody may write the memory while the kernel runs.
  const std::string constant_load = "ld.global.nc.u32 %r4, [%rd4];\n";
  ok(run(wait + constant_load, {}));
  fails(run(wait + constant_load, first.unfinished), Fault::non_coherent, "may move before griddepcontrol.wait");

  // Of two warps, one waits.
  const std::string one_waits = "setp.lt.u32 %p1, %r1, 32;\n@%p1 griddepcontrol.wait;\n";
  ok(run(one_waits + "bar.sync 0;\n" + load, first.unfinished, 64));
  fails(run(one_waits + load, first.unfinished, 64), Fault::grid_race, "thread (32,0,0)");

  // A third launch is ordered after the first one by the second.
  const auto third = [&](const std::string& second, const std::string& body) {
    const LaunchResult r = run(second, first.unfinished);
    ok(r);
    return run(body, r.unfinished);
  };
  ok(third(wait + trigger + store, load));
  ok(third(trigger + wait + store, wait + load));
  ok(third(wait + trigger + store, constant_load));
  fails(third(trigger + wait + store, wait + constant_load), Fault::non_coherent, "may move before");
  fails(third(trigger + wait + store, load + wait), Fault::grid_race, "may still run before griddepcontrol.wait");
  fails(third(store, wait + load), Fault::grid_race, "the one between did not execute");
}

}  // namespace

void arithmetic_of_sums() {
  current = "CUDASIM_MMA";
  for (const char* name : {"", "ordered", "card"}) {
    Env c("CUDASIM_MMA", name);
    ok(launch("", {}, nullptr, nullptr));
  }
  Env c("CUDASIM_MMA", "cards");
  fails(launch("", {}, nullptr, nullptr), Fault::bad_launch, "CUDASIM_MMA=cards is unknown");
}

void checks() {
  arithmetic_of_sums();
  setmaxnreg();
  distributed_shared_memory();
  ranks_in_addresses();
  wgmma_fence();
  proxy_of_writes();
  counters();
  dependent_launches();
}
