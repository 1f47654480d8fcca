// Launches: the host threads that run the CTAs of a grid, and the profile of what they did.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <thread>

#include "decode.h"

namespace cudasim {

static void work(Worker& wk) {
  LaunchState& ls = *wk.ls;
  std::vector<std::unique_ptr<Group>> resident;
  size_t target = ls.cluster_size > 1 ? 1 : 2;
  // CTAs may wait for CTAs that are not running yet. If no CTA finishes, admit more, faster and faster.
  uint64_t patience = 400000, since = 0;
  for (;;) {
    while (resident.size() < target && !ls.stop) {
      uint64_t i = ls.next_group.fetch_add(1);
      if (i >= ls.group_count) break;
      std::unique_ptr<Group> g;
      if (!wk.pool.empty()) {
        g = std::move(wk.pool.back());
        wk.pool.pop_back();
      } else {
        g = std::make_unique<Group>();
        g->wk = &wk;
      }
      g->start(uint32_t(i));
      resident.push_back(std::move(g));
    }
    if (resident.empty()) return;
    bool finished = false;
    uint64_t slice = resident.size() > 8 ? 3000 : 20000;
    for (size_t i = 0; i < resident.size() && !ls.stop;) {
      uint64_t before = resident[i]->executed;
      bool done = resident[i]->run(ls.seeded ? 1 + wk.random(uint32_t(slice)) : slice);
      since += resident[i]->executed - before;
      if (ls.time_limit > 0 &&
          std::chrono::duration<double>(std::chrono::steady_clock::now() - ls.started).count() > ls.time_limit &&
          !ls.stop)
        resident[i]->stuck("time limit: the kernel did not finish within CUDASIM_TIMEOUT seconds");
      if (done) {
        finished = true;
        wk.busiest = std::max(wk.busiest, resident[i]->executed);
        wk.pool.push_back(std::move(resident[i]));
        resident.erase(resident.begin() + long(i));
      } else
        ++i;
    }
    if (ls.stop) return;
    if (finished) {
      since = 0;
      patience = 400000;
    } else if (since > patience * resident.size() || (since == 0)) {
      since = 0;
      patience = std::max<uint64_t>(patience / 2, 2000);
      if (ls.next_group < ls.group_count) target = resident.size() + 1;
    }
    if (resident.size() > 16 && !finished) std::this_thread::yield();
  }
}

// What may still run when a programmatic dependent launch after this one starts, and when this one has ended.
static std::shared_ptr<const Unfinished> unfinished_after(const LaunchState& ls) {
  auto next = std::make_shared<Unfinished>();
  if (ls.after) {
    next->before_wait = ls.waited_first ? ls.after->after_wait : ls.after->before_wait;
    next->after_wait = ls.waited ? ls.after->after_wait : ls.after->before_wait;
  }
  next->before_wait.push_back(ls.grid_check);
  return next;
}

static uint32_t worker_count() {
  if (const char* e = getenv("CUDASIM_THREADS")) return uint32_t(std::max(1, atoi(e)));
  return std::max(1u, std::thread::hardware_concurrency());
}

std::shared_ptr<const std::vector<Range>> current_ranges();

LaunchResult launch(Kernel* k, const LaunchConfig& cfg) {
  auto t0 = std::chrono::steady_clock::now();
  LaunchState ls;
  ls.kernel = k;
  LaunchResult bad;
  bad.fault = Fault::bad_launch;
  bad.profile.kernel = k ? k->name : "";
  if (!k) {
    bad.message = "no kernel";
    return bad;
  }
  {
    std::lock_guard<std::mutex> lock(k->mutex);
    if (!k->image) k->image.reset(decode_kernel(k->module, k->ast, nullptr));
  }
  ls.image = k->image.get();
  ls.grid = cfg.grid;
  ls.block = cfg.block;
  ls.cluster = cfg.cluster;
  ls.registers = cfg.registers;
  ls.arch = cfg.arch;
  ls.after = cfg.after;
  if (k->ast->cluster[0]) {
    ls.cluster = {k->ast->cluster[0], k->ast->cluster[1], k->ast->cluster[2]};
    ls.explicit_cluster = true;
  }
  ls.explicit_cluster |= ls.cluster.x * ls.cluster.y * ls.cluster.z > 1;
  ls.cluster_size = ls.cluster.x * ls.cluster.y * ls.cluster.z;
  auto check = [&](bool ok, const std::string& what) {
    if (ok) return true;
    bad.message = "kernel " + k->name + ": bad launch: " + what;
    return false;
  };
  uint64_t threads = uint64_t(cfg.block.x) * cfg.block.y * cfg.block.z;
  uint64_t nblocks = uint64_t(cfg.grid.x) * cfg.grid.y * cfg.grid.z;
  if (!check(threads >= 1 && threads <= 1024, "block of " + std::to_string(threads) + " threads") ||
      !check(cfg.block.z <= 64, "block.z above 64") || !check(nblocks >= 1, "empty grid") ||
      !check(cfg.grid.y <= 65535 && cfg.grid.z <= 65535, "grid.y or grid.z above 65535") ||
      !check(!k->ast->maxntid || threads <= k->ast->maxntid,
             "block exceeds __launch_bounds__ of " + std::to_string(k->ast->maxntid)) ||
      !check(!k->ast->reqntid || threads == k->ast->reqntid, "block differs from the required block size") ||
      !check(ls.cluster_size >= 1 && ls.cluster_size <= 16 && cfg.grid.x % ls.cluster.x == 0 &&
                 cfg.grid.y % ls.cluster.y == 0 && cfg.grid.z % ls.cluster.z == 0,
             "grid is not a multiple of the cluster") ||
      !check(cfg.args || k->ast->params.empty(), "no arguments"))
    return bad;
  const char* const e = getenv("CUDASIM_MMA");
  const std::string mma = e ? e : "";
  ls.card_sums = mma == "card";
  if (!check(ls.card_sums || mma.empty() || mma == "ordered",
             "CUDASIM_MMA=" + mma + " is unknown: expected ordered (the default) or card"))
    return bad;
  uint32_t stat = ls.image->static_shared;
  if (cfg.dynamic_shared_bytes)
    stat = (stat + ls.image->dynamic_align - 1) / ls.image->dynamic_align * ls.image->dynamic_align;
  ls.dynamic_shared = cfg.dynamic_shared_bytes;
  ls.shared_bytes = stat + cfg.dynamic_shared_bytes;
  if (!check(ls.shared_bytes <= 227 * 1024,
             std::to_string(ls.shared_bytes) + " bytes of shared memory exceed 227 KiB") ||
      !check(ls.image->static_shared <= 48 * 1024, "static shared memory exceeds 48 KiB"))
    return bad;
  ls.workspace = (ls.image->param_bytes + 63) / 64 * 64;
  ls.params.resize(ls.workspace + 64);
  for (size_t i = 0; i < k->ast->params.size(); ++i)
    memcpy(ls.params.data() + ls.image->param_offset[i], cfg.args[i], k->ast->params[i].size);
  ls.ranges = current_ranges();
  ls.group_count = nblocks / ls.cluster_size;
  if (const char* e = getenv("CUDASIM_CHECK")) {
    std::string s(e);
    ls.check_fence = s.find("fence") != s.npos;
    ls.check_race = ls.check_fence || s.find("race") != s.npos;
    ls.check_init = s.find("init") != s.npos;
    if (s.find("grid") != s.npos) ls.grid_check = std::make_shared<Grid>(ls, s.find("benign") != s.npos);
  }
  ls.started = t0;
  if (const char* e = getenv("CUDASIM_TIMEOUT")) ls.time_limit = atof(e);
  if (const char* e = getenv("CUDASIM_SEED")) {
    ls.seed = strtoull(e, nullptr, 0);
    ls.seeded = *e != 0;
  }

  uint32_t n = uint32_t(std::min<uint64_t>(worker_count(), ls.group_count));
  std::vector<std::unique_ptr<Worker>> workers;
  for (uint32_t i = 0; i < n; ++i) {
    workers.push_back(std::make_unique<Worker>());
    workers[i]->ls = &ls;
    workers[i]->grid = ls.grid_check.get();
    for (auto& p : workers[i]->grid_pages) p.first = ~0ull;
    workers[i]->id = i;
    workers[i]->rng.seed(uint32_t(ls.seed * 2654435761u + i * 40503u + 12345u));
  }
  auto guarded = [&](Worker& w) {
    // the host program may have changed the rounding mode or flush-to-zero
    struct Csr {
      unsigned old = _mm_getcsr();
      Csr() { _mm_setcsr(0x1f80); }
      ~Csr() { _mm_setcsr(old); }
    } csr;
    try {
      work(w);
    } catch (const std::exception& e) {
      std::lock_guard<std::mutex> lock(ls.mutex);
      if (!ls.stop.exchange(true)) {
        ls.result.fault = Fault::internal;
        ls.result.message = "kernel " + k->name + ": simulator error: " + e.what();
      }
    } catch (const SimFault& e) {
      std::lock_guard<std::mutex> lock(ls.mutex);
      if (!ls.stop.exchange(true)) {
        ls.result.fault = e.fault;
        ls.result.message = "kernel " + k->name + ": " + e.message;
      }
    }
  };
  std::vector<std::thread> threads_v;
  for (uint32_t i = 1; i < n; ++i) threads_v.emplace_back([&, i] { guarded(*workers[i]); });
  guarded(*workers[0]);
  for (auto& t : threads_v) t.join();

  Profile& p = ls.result.profile;
  p.kernel = k->name;
  p.grid = cfg.grid;
  p.block = cfg.block;
  Counters sum;
  for (auto& w : workers) {
    const Counters& c = w->count;
    for (int i = 0; i < C_count; ++i) sum.warp[i] += c.warp[i];
    sum.threads += c.threads;
    sum.mma_flops += c.mma_flops;
    sum.tcgen05_flops += c.tcgen05_flops;
    sum.tcgen05_wavefronts += c.tcgen05_wavefronts;
    sum.sectors_read += c.sectors_read;
    sum.sectors_written += c.sectors_written;
    sum.sectors_read_ideal += c.sectors_read_ideal;
    sum.sectors_written_ideal += c.sectors_written_ideal;
    sum.wavefronts += c.wavefronts;
    sum.wavefronts_ideal += c.wavefronts_ideal;
    sum.async_sectors_read += c.async_sectors_read;
    sum.async_sectors_received += c.async_sectors_received;
    sum.constant_wavefronts += c.constant_wavefronts;
    p.busiest_cluster_instructions = std::max(p.busiest_cluster_instructions, w->busiest);
    if (w != workers[0]) {
      workers[0]->read.merge_from(w->read);
      workers[0]->written.merge_from(w->written);
    }
  }
  for (int i = 0; i < C_count; ++i) p.warp_instructions += sum.warp[i];
  p.thread_instructions = sum.threads;
  p.integer = sum.warp[C_integer];
  p.fp32 = sum.warp[C_fp32];
  p.half = sum.warp[C_half];
  p.convert = sum.warp[C_convert];
  p.special = sum.warp[C_special];
  p.control = sum.warp[C_control];
  p.mma = sum.warp[C_mma];
  p.load_global = sum.warp[C_load_global];
  p.store_global = sum.warp[C_store_global];
  p.load_shared = sum.warp[C_load_shared];
  p.store_shared = sum.warp[C_store_shared];
  p.load_local = sum.warp[C_load_local];
  p.store_local = sum.warp[C_store_local];
  p.load_const = sum.warp[C_load_const];
  p.async_copy = sum.warp[C_async];
  p.barrier = sum.warp[C_barrier];
  p.shuffle = sum.warp[C_shuffle];
  p.atomic = sum.warp[C_atomic];
  p.mma_flops = sum.mma_flops;
  p.tcgen05_flops = sum.tcgen05_flops;
  p.tcgen05_wavefronts = sum.tcgen05_wavefronts;
  p.global_sectors_read = sum.sectors_read;
  p.global_sectors_written = sum.sectors_written;
  p.global_sectors_read_ideal = sum.sectors_read_ideal;
  p.global_sectors_written_ideal = sum.sectors_written_ideal;
  p.unique_bytes_read = workers[0]->read.sectors() * 32;
  p.unique_bytes_written = workers[0]->written.sectors() * 32;
  p.shared_wavefronts = sum.wavefronts;
  p.shared_wavefronts_ideal = sum.wavefronts_ideal;
  p.async_sectors_read = sum.async_sectors_read;
  p.async_sectors_received = sum.async_sectors_received;
  p.constant_wavefronts = sum.constant_wavefronts;
  if (ls.grid_check) ls.result.unfinished = unfinished_after(ls);
  p.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
  return std::move(ls.result);
}

}  // namespace cudasim
