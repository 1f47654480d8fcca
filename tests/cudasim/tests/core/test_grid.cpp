// Races between blocks: what is ordered must pass, what is not must be reported, whatever the schedule.
#include <algorithm>

#include "harness.h"

using namespace test;
using cudasim::Fault;

static bool says(const cudasim::LaunchResult& r, const char* text) {
  return check(r.message.find(text) != std::string::npos, std::string("\"") + text + "\" in: " + r.message);
}

static void check_all(Ptx& p, const std::string& file) {
  const unsigned blocks = 12, threads = 128;
  const auto name = [&](const char* n) { current = file + " " + n; };
  Buf<float> in(3000, 1.f);
  for (auto [k, want] : {std::pair{"last_block_fences", Fault::none},
                         {"last_block_no_fence", Fault::grid_race},
                         {"last_block_no_producer_fence", Fault::grid_race},
                         {"last_block_no_consumer_fence", Fault::grid_race}}) {
    name(k);
    Buf<float> partial(blocks), out(1);
    Buf<unsigned> ticket(1);
    auto r = run(p, k, {{blocks}, {threads}}, in.p, 3000, partial.p, ticket.p, out.p);
    expect_fault(r, want);
    if (want == Fault::none)
      check(out[0] == 3000, "sum");
    else
      says(r, "is not ordered after a write by block (");
    if (std::string(k) == "last_block_no_consumer_fence") says(r, "executed no fence after");
    if (std::string(k) == "last_block_no_producer_fence") says(r, "nothing publishes it");
  }
  for (auto [k, want] : {std::pair{"tickets_all_fence", Fault::none},
                         {"tickets_one_fence", Fault::none},
                         {"tickets_one_acq_rel_fence", Fault::none},
                         {"tickets_atomic_order", Fault::none},
                         {"tickets_nc", Fault::non_coherent},
                         {"tickets_all_acq_rel_fence", Fault::grid_race},
                         {"tickets_no_fence_after", Fault::grid_race},
                         {"tickets_no_barrier", Fault::grid_race}}) {
    name(k);
    Buf<float> partial(blocks * threads), out(threads);
    Buf<unsigned> ticket(1);
    auto r = run(p, k, {{blocks}, {threads}}, partial.p, ticket.p, out.p);
    expect_fault(r, want);
    if (want == Fault::none) check(out[3] == blocks * 3 + blocks * (blocks - 1) / 2, "sum");
    if (want == Fault::non_coherent) says(r, "ld.global.nc reads 4 bytes");
  }
  for (auto [k, want] : {std::pair{"flag_fences", Fault::none},
                         {"flag_release_acquire", Fault::none},
                         {"flag_no_producer_fence", Fault::grid_race},
                         {"flag_no_consumer_fence", Fault::grid_race},
                         {"flag_of_block_scope", Fault::grid_race}}) {
    name(k);
    Buf<int> data(threads), flag(1), out(threads);
    expect_fault(run(p, k, {{2}, {threads}}, data.p, flag.p, out.p), want);
    if (want == Fault::none) check(out[7] == 8, "value");
  }
  name("read_then_written");
  {
    Buf<int> data(threads), out(threads);
    expect_fault(run(p, "read_then_written", {{2}, {threads}}, data.p, out.p), Fault::grid_race);
  }
  name("both_write");
  {
    Buf<int> data(threads);
    auto r = run(p, "both_write", {{2}, {threads}}, data.p, 1);
    expect_fault(r, Fault::grid_race);
    says(r, "(the kernel has no fence)");
    expect_fault(run(p, "both_write", {{2}, {threads}}, data.p, 0), Fault::grid_same_value);
    Env fine("CUDASIM_CHECK", "grid,benign");
    ok(run(p, "both_write", {{2}, {threads}}, data.p, 0));
    expect_fault(run(p, "both_write", {{2}, {threads}}, data.p, 1), Fault::grid_race);
  }
  name("neighbours");
  {
    Buf<uint16_t> h(2 * threads);
    ok(run(p, "halves_of_words", {{2}, {threads}}, h.p));
    Buf<uint8_t> b(4 * threads);
    ok(run(p, "bytes_of_words", {{4}, {threads}}, b.p));
  }
  name("atomics");
  {
    Buf<int> data(threads), out(4 * threads);
    ok(run(p, "counts", {{4}, {threads}}, data.p));
    expect_fault(run(p, "counts_read_plainly", {{4}, {threads}}, data.p, out.p), Fault::grid_race);
  }
  name("nc_then_written");
  {
    Buf<int> data(threads), out(threads);
    auto r = run(p, "nc_then_written", {{1}, {threads}}, data.p, out.p);
    expect_fault(r, Fault::non_coherent);
    says(r, "was read by ld.global.nc in the same launch");
  }
  name("grid_phases");
  {
    Buf<int> count(1), data(8 * threads), out(8 * threads);
    ok(run(p, "grid_phases", {{8}, {threads}}, count.p, data.p, out.p));
    check(out[0] == 7, "value");
  }
}

void grid(const std::string& file) {
  current = file;
  Ptx p(dir + "/" + file);
  if (!p.m) return;
  for (const char* seed : {"", "1", "2", "3"}) {
    Env c("CUDASIM_CHECK", "grid"), s("CUDASIM_SEED", seed);
    check_all(p, file + (*seed ? std::string(" seed ") + seed : ""));
  }
}
