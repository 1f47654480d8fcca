// Runs the tests of the interpreter on every form of their PTX: test_core DIRECTORY.
#include "harness.h"

using namespace test;

// Each in a file of its name.
void basic(const std::string& file);
void gemm(const std::string& file);
void hopper(const std::string& file);
void blackwell(const std::string& file);
void library(const std::string& file);
void bugs(const std::string& file);  // test_library.cpp
void grid(const std::string& file);
void handwritten();
void checks();

static void speed(const std::string& file) {
  current = "speed";
  Ptx p(dir + "/" + file);
  Buf<float> out(256 * 64);
  Env one("CUDASIM_THREADS", "1");
  auto r = run(p, "alu_speed", {{64}, {256}}, out.p, 200);
  ok(r);
  std::printf("alu_speed: %.1f M lane-instructions/s on one thread (%.1f ns per warp instruction)\n",
              r.profile.thread_instructions / r.profile.seconds / 1e6,
              r.profile.seconds * 1e9 / r.profile.warp_instructions);
}

int main(int argc, char** argv) {
  dir = argc > 1 ? argv[1] : "build/tests";
  for (const char* v : {"basic.80.ptx", "basic.80g.ptx", "basic.90a.ptx"}) basic(v);
  {
    Env seed("CUDASIM_SEED", "12345");
    basic("basic.80.ptx");
  }
  {
    Env c("CUDASIM_CHECK", "race,init");
    basic("basic.80.ptx");
  }
  handwritten();
  checks();
  for (const char* v : {"gemm.80.ptx", "gemm.80g.ptx", "gemm.90a.ptx"}) gemm(v);
  {
    Env seed("CUDASIM_SEED", "99");
    gemm("gemm.80.ptx");
  }
  for (const char* v : {"bugs.80.ptx", "bugs.80g.ptx", "bugs.90a.ptx"}) bugs(v);
  for (const char* v : {"library.80.ptx", "library.90a.ptx", "library.80g.ptx"}) library(v);
  {
    Env c("CUDASIM_CHECK", "race,init");
    library("library.80.ptx");
    library("library.90a.ptx");
  }
  {
    Env seed("CUDASIM_SEED", "31");
    library("library.90a.ptx");
  }
  hopper("hopper_sm90.90a.ptx");
  blackwell("blackwell_sm100.100a.ptx");
  for (const char* v : {"grid.80.ptx", "grid.80g.ptx", "grid.90a.ptx"}) grid(v);
  {
    Env c("CUDASIM_CHECK", "grid");  // nothing here is wrong
    basic("basic.80.ptx");
    basic("basic.90a.ptx");
    library("library.90a.ptx");
    gemm("gemm.90a.ptx");
    hopper("hopper_sm90.90a.ptx");
  }
  speed("basic.80.ptx");
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
