// Minimal test harness: loads a PTX file, launches kernels on host buffers, counts checks.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "cudasim.h"

namespace test {

inline int passed = 0, failed = 0;
inline std::string current;
inline std::string dir;  // of the PTX files
inline int arch = 90;    // of the simulated device

inline bool check(bool ok, const std::string& what) {
  if (ok)
    ++passed;
  else {
    ++failed;
    std::printf("FAIL %s: %s\n", current.c_str(), what.c_str());
  }
  return ok;
}

// Device memory: a host buffer that the simulator knows about.
template <class T>
struct Buf {
  std::vector<T> storage;
  T* p;
  size_t n;
  explicit Buf(size_t count, T fill = T()) : storage(count + 256 / sizeof(T) + 1, fill), n(count) {
    p = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(storage.data()) + 255) / 256 * 256);
    std::fill(p, p + n, fill);
    cudasim::register_allocation(p, n * sizeof(T));
  }
  ~Buf() { cudasim::unregister_allocation(p); }
  Buf(const Buf&) = delete;
  T& operator[](size_t i) { return p[i]; }
};

struct Ptx {
  cudasim::Module* m = nullptr;
  explicit Ptx(const std::string& path) {
    std::ifstream f(path, std::ios::binary);
    std::stringstream ss;
    ss << f.rdbuf();
    std::string text = ss.str(), err;
    m = cudasim::load_module(text.data(), text.size(), &err);
    check(m != nullptr, "load " + path + ": " + err);
  }
  ~Ptx() { cudasim::unload_module(m); }
};

struct Config {
  cudasim::Dim3 grid{}, block{}, cluster{};
  uint32_t smem = 0;
};

template <class... A>
cudasim::LaunchResult run(Ptx& ptx, const char* name, Config c, const A&... args) {
  cudasim::Kernel* k = cudasim::find_kernel(ptx.m, name);
  if (!k) {
    check(false, std::string("kernel not found: ") + name);
    return {};
  }
  void* a[] = {const_cast<void*>(static_cast<const void*>(&args))..., nullptr};
  cudasim::LaunchConfig lc;
  lc.grid = c.grid;
  lc.block = c.block;
  lc.cluster = c.cluster;
  lc.dynamic_shared_bytes = c.smem;
  lc.arch = arch;
  lc.args = a;
  return cudasim::launch(k, lc);
}
inline bool ok(const cudasim::LaunchResult& r) { return check(r.fault == cudasim::Fault::none, "fault: " + r.message); }
inline const char* fault_name(cudasim::Fault f) {
  static const char* n[] = {"none",
                            "unsupported_instruction",
                            "global_out_of_bounds",
                            "shared_out_of_bounds",
                            "misaligned",
                            "uninitialized_shared",
                            "shared_race",
                            "barrier_deadlock",
                            "bad_launch",
                            "trap",
                            "internal",
                            "grid_race",
                            "grid_same_value",
                            "non_coherent",
                            "registers",
                            "shared_lifetime",
                            "tensor_memory"};
  return n[int(f)];
}
inline void expect_fault(const cudasim::LaunchResult& r, cudasim::Fault f) {
  check(r.fault == f,
        std::string("expected fault ") + fault_name(f) + ", got " + fault_name(r.fault) + ": " + r.message);
  if (getenv("VERBOSE")) std::printf("  %s\n", r.message.c_str());
}

struct Rng {
  uint64_t s;
  explicit Rng(uint64_t seed = 1) : s(seed * 0x9e3779b97f4a7c15ull + 1) {}
  uint32_t u() {
    s ^= s << 13;
    s ^= s >> 7;
    s ^= s << 17;
    return uint32_t(s >> 16);
  }
  float f(float lo = -1, float hi = 1) { return lo + (hi - lo) * float(u() & 0xffffff) / float(0x1000000); }
};

struct Env {  // scoped environment variable
  std::string name, before;
  bool was_set;
  Env(const char* n, const char* v) : name(n), was_set(getenv(n)) {
    if (was_set) before = getenv(n);
    setenv(n, v, 1);
  }
  ~Env() {
    if (was_set)
      setenv(name.c_str(), before.c_str(), 1);
    else
      unsetenv(name.c_str());
  }
};

inline float from_f16(uint16_t h) { return _cvtsh_ss(h); }
inline uint16_t to_f16(float f) { return uint16_t(_cvtss_sh(f, 0)); }
inline float from_bf16(uint16_t h) {
  uint32_t u = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint16_t to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

}  // namespace test
