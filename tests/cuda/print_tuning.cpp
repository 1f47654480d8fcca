// Prints, as JSON, how the files of cuda/tuning configure kernels on any card; test_cuda_tuning.py compiles and reads
// it.
#include <array>
#include <cstdio>
#include <iterator>

#include "cuda/tuning/choose.h"
#include "cuda/tuning/codec.h"
#include "cuda/tuning/stream.h"

using namespace qlora;
using namespace qlora::cuda;

Device card(int arch, int sms, int l2_mb) {
  Device d;
  d.arch = arch, d.sm_count = sms, d.l2_bytes = l2_mb << 20;
  d.resident_clusters = estimated_clusters(sms);
  return d;
}

// Hopper cards: the estimates for three, GPCs of a usual H100, GPCs of another with fewer clusters, and one without
// clusters.
const Device kHoppers[] = {
    card(90, 78, 50),
    card(90, 114, 50),
    card(90, 132, 50),
    {0, 90, 132, 227 << 10, 50 << 20, true, {132, 66, 42, 31, 23, 19, 16, 15}},
    {0, 90, 132, 227 << 10, 50 << 20, true, {132, 64, 42, 31, 22, 18, 15, 15}},
    {0, 90, 132, 227 << 10, 50 << 20, false, {132}},
};

// Devices as the driver describes them: architecture, SMs, clocks, bus and whether they share the host's memory.
Device queried(int arch, int sms, int clock_khz, int memory_clock_khz, int bus_bits, bool integrated = false) {
  Device d = card(arch, sms, 48);
  d.clock_khz = clock_khz, d.memory_clock_khz = memory_clock_khz, d.bus_bits = bus_bits, d.is_integrated = integrated;
  return d;
}
const Card kQueried[] = {
    {"A100", queried(80, 108, 1'410'000, 1'593'000, 5120)}, {"A10", queried(86, 72, 1'695'000, 6'251'000, 384)},
    {"L4", queried(89, 60, 2'040'000, 6'251'000, 192)},     {"RTX 4090", queried(89, 128, 2'520'000, 10'501'000, 384)},
    {"GB10", queried(121, 48, 2'418'000, 0, 0, true)},
};

void print_rates(const Card& card) {
  const Rates rates = rates_of(card.device);
  std::printf("\"%s\": [%.6g, %.6g, %.6g]", card.name.data(), rates.flops, rates.float32_flops, rates.bytes);
}

int main() {
  const char* comma = "";
  std::printf("{\"forward\": [");
  for (int slots : {108, 132, 216, 264, 170})
    for (int tiles : {1, 8, 32, 86, 112, 128, 148, 224, 1002})
      for (int segments : {1, 9, 64, 172, 224})
        for (int tokens : {8, 64}) {
          const auto splits = sm80::forward_splits(tiles, segments, 2, tokens, slots);
          const auto each = sm80::forward_split_segments(segments, splits, 2);
          const bool streams =
              sm80::forward_streams(tiles, segments, 2, tokens, slots, splits, true, card(80, 108, 40));
          const auto run = sm80::stream_cta_segments(int64_t{tiles} * segments, slots);
          std::printf("%s[%d, %d, %d, %d, %ld, %ld]", comma, slots, tiles, segments, tokens, long(each),
                      streams ? long(run) : 0L);
          comma = ", ";
        }
  std::printf("], \"dx\": [");
  comma = "";
  for (int n : {1, 64, 4096, 14336, 128256})
    for (int k : {64, 4096, 11008})
      for (int m : {1, 16, 64, 200})
        for (int ctas : {1, 2}) {
          const Config c = sm80::dx_tile(m, {});
          const auto tiles = ceil_div(m, c.tokens) * ceil_div(k, c.columns);
          const auto rows = dx_split_rows(n, dx_splits(tiles, n, c.tokens, ctas, card(90, 132, 50)));
          std::printf("%s[%d, %d, %d, %d, %ld, %ld, %ld, %ld]", comma, n, k, m, 132 * ctas, long(c.tokens),
                      long(c.columns), long(ceil_div(n, rows)), long(rows));
          comma = ", ";
        }
  std::printf("], \"crossover\": {");
  comma = "";
  for (int arch : {75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121}) {
    std::printf("%s\"%d\": [%ld, %ld, %ld]", comma, arch,
                long(library_crossover(DType::kBFloat16, 4096, 64, card(arch, 100, 40))),
                long(library_crossover(DType::kFloat32, 4096, 64, card(arch, 100, 40))),
                long(library_crossover(DType::kBFloat16, 4095, 64, card(arch, 100, 40))));
    comma = ", ";
  }
  std::printf("}, \"rates\": {");
  for (const Card& known : kCards) print_rates(known), std::printf(", ");
  for (const Card& known : kQueried) print_rates(known), std::printf(&known == std::end(kQueried) - 1 ? "" : ", ");
  std::printf("}, \"panel\": [");
  comma = "";
  for (const auto& [name, device] : kCards)
    for (int m : {100, 768, 4096, 65536})
      for (int inner : {64, 4096, 128256})
        for (int columns : {1, 300, 4096, 14336})
          for (const bool sums : {false, true})
            for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
              const PanelProduct product{m, inner, columns, sums, dtype};
              std::printf("%s[\"%s\", %d, %d, %d, %d, %d, %ld, %ld]", comma, name.data(), m, inner, columns, sums,
                          int(dtype_bytes(dtype)), long(device.l2_bytes),
                          long(library_panel_columns(product, 256, device)));
              comma = ", ";
            }
  std::printf("], \"gemm\": [");
  comma = "";
  for (const auto& [name, device] : kCards)
    for (int m : {1, 300, 1024, 4096, 65536})
      for (int inner : {64, 4096, 14336})
        for (int columns : {8, 1024, 4096, 14336}) {
          const PanelProduct product{m, inner, columns, false, DType::kBFloat16};
          const gemm::Cuts cuts = gemm::cuts(product, device);
          const int64_t panel = gemm::panel_columns(product, 256, device);
          std::printf("%s[\"%s\", %d, %d, %d, %ld, %ld, %ld, %ld, %ld, %.0f]", comma, name.data(), m, inner, columns,
                      long(cuts.whole), long(cuts.parts), long(device.l2_bytes), long(panel),
                      long(gemm::panels_stages(product, panel, cuts, device)),
                      gemm::panels_time(product, panel, cuts, device));
          comma = ", ";
        }
  std::printf("], \"b200\": [");
  comma = "";
  for (int m : {16, 64, 128, 256, 300, 1024, 4096})
    for (int n : {1024, 4096, 14336})
      for (int k : {64, 4096, 14336}) {
        LinearProblem p;
        p.dtype = DType::kBFloat16, p.m = m, p.w.n = n, p.w.k = k;
        for (const auto& [name, device] : kCards) {
          if (device.arch != 100) continue;
          const Config c = library::config(p, device, {});
          std::printf("%s[%d, %d, %d, %ld, %ld, %ld, \"%s\", %.0f, %.0f, ", comma, m, n, k, long(device.l2_bytes),
                      long(c.splits), long(c.panel), kernel_name(choose(p, device).kernel), library::time(p, device, c),
                      sm100::fused_time(p, device));
          const auto print = [&](const auto& p, int outputs) {
            const Config own = sm100::config(p, device, {});
            std::printf("[%ld, %ld, %ld, %ld, %.0f]", long(own.tokens), long(own.splits), long(own.multicast),
                        long(sm90::clusters(m, outputs, own, device)), sm100::time(p, device));
          };
          print(p, n);
          LinearDxProblem dx;
          dx.dtype = DType::kBFloat16, dx.m = m, dx.w.n = n, dx.w.k = k;
          std::printf(", [\"%s\", %.0f, %.0f], ", kernel_name(choose(dx, device).kernel),
                      library::time(dx, device, library::config(dx, device, {})), sm100::fused_time(dx, device));
          print(dx, k);
          std::printf("]");
          comma = ", ";
        }
      }
  std::printf("], \"cuts\": [");
  comma = "";
  for (auto [arch, sms] : {std::array{80, 108}, {80, 56}, {80, 14}, {89, 128}, {89, 58}, {120, 170}, {120, 48}})
    for (int m : {1, 300, 1024, 4096})
      for (int inner : {64, 4096, 14336}) {
        const gemm::Cuts cuts = gemm::cuts({m, inner, 4096, false, DType::kBFloat16}, card(arch, sms, 40));
        std::printf("%s[%d, %d, %d, %ld, %ld]", comma, arch, m, inner, long(cuts.whole), long(cuts.parts));
        comma = ", ";
      }
  std::printf("], \"a100\": [");
  comma = "";
  for (auto [m, n, k] : {std::array{256, 4096, 4096}, {1024, 4096, 4096}, {256, 14336, 4096}, {256, 4096, 14336}}) {
    const Device a100 = kCards[1].device;
    PanelProduct product{m, k, n, false, DType::kBFloat16};
    const auto best = [&](const auto& time) { return time(fastest_panel(product, 256, a100, time)) / 1000; };
    const auto by_gemm = [&](gemm::Cuts cuts) {
      return best([&](int64_t panel) { return gemm::panels_time(product, panel, cuts, a100); });
    };
    const double cut = by_gemm(gemm::cuts(product, a100)), whole = by_gemm({n, 1});
    product.float32_sums = true;
    const double theirs = best([&](int64_t panel) { return library_time(product, panel, a100); });
    std::printf("%s[%d, %d, %d, %.0f, %.0f, %.0f]", comma, m, n, k, cut, whole, theirs);
    comma = ", ";
  }
  std::printf("], \"feedback\": [");
  comma = "";
  for (int sms : {1, 108, 132})
    for (int n : {1, 31, 1024, 4096, 14336}) {
      std::printf("%s[%d, %d, %d]", comma, sms, n, feedback_warps(n, 4, card(90, sms, 50)));
      comma = ", ";
    }
  std::printf("], \"sm90\": [");
  comma = "";
  for (const Device& hopper : kHoppers)
    for (int m : {33, 64, 100, 256, 1000, 4096})
      for (int outputs : {1, 128, 1920, 2048, 3968, 4096, 11008, 128256})
        for (int inner : {64, 1024, 4096, 14336}) {
          const auto print = [&](const char* what, int stage, const Config& c) {
            const auto stages = ceil_div(inner, stage);
            std::printf("%s[\"%s\", [", comma, what);
            for (const int& fit : hopper.resident_clusters)
              std::printf("%d%s", fit, &fit == &hopper.resident_clusters.back() ? "" : ", ");
            std::printf("], %d, %d, %ld, %ld, %ld, %ld, %ld, %ld]", m, outputs, long(stages), long(c.tokens),
                        long(c.splits), long(ceil_div(stages, c.splits)), long(sm90::clusters(m, outputs, c, hopper)),
                        long(c.multicast));
            comma = ", ";
          };
          LinearProblem forward;
          forward.m = m, forward.w.n = outputs, forward.w.k = inner;
          print("forward", 128, sm90::config(forward, hopper, {}));
          LinearDxProblem dx;
          dx.m = m, dx.w.n = inner, dx.w.k = outputs;
          print("dx", 64, sm90::config(dx, hopper, {}));
        }
  std::printf("]}\n");
}
