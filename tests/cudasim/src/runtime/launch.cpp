// Kernel launches: performs the checks of a real launch, runs the grid, and writes the profile.
#include <cuda.h>
#include <cxxabi.h>
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "graph.h"
#include "runtime.h"

namespace cudasim::runtime {
namespace {

struct Launch {
  dim3 grid, block, cluster{1, 1, 1};
  size_t shared = 0;
  bool cooperative = false;
  bool dependent = false;  // a programmatic dependent launch
  cudaStream_t stream = nullptr;
  void** args = nullptr;
};

std::string text(dim3 d) {
  return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
}
uint64_t volume(dim3 d) { return uint64_t{d.x} * d.y * d.z; }

std::string demangle(const char* name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  std::string result = status == 0 ? text : name;
  std::free(text);
  return result;
}

std::string json_string(const std::string& s) {
  std::string out = "\"";
  for (const char c : s) {
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) < 0x20) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", c);
      out += escaped;
    } else {
      out += c;
    }
  }
  return out + '"';
}

void write_profile(const Profile& p, const char* mangled, const Launch& launch, const Resources& r,
                   const LaunchResult& result) {
  static const int file = [] {
    const char* path = std::getenv("CUDASIM_PROFILE");
    if (!path || !*path) return -1;
    const int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (fd < 0) complain("cannot write the profile %s", path);
    return fd;
  }();
  if (file < 0) return;
  std::string line = "{\"kernel\":" + json_string(demangle(mangled)) + ",\"mangled\":" + json_string(mangled);
  const auto add = [&line](const char* key, uint64_t value) {
    line += ",\"" + std::string(key) + "\":" + std::to_string(value);
  };
  const auto add_dims = [&line](const char* key, dim3 d) {
    line += ",\"" + std::string(key) + "\":[" + std::to_string(d.x) + "," + std::to_string(d.y) + "," +
            std::to_string(d.z) + "]";
  };
  add_dims("grid", launch.grid);
  add_dims("block", launch.block);
  add_dims("cluster", launch.cluster);
  line += launch.dependent ? ",\"dependent\":true" : ",\"dependent\":false";
  add("dynamic_shared_bytes", launch.shared);
  add("static_shared_bytes", r.info.static_shared_bytes);
  add("local_bytes", r.info.local_bytes);
  add("registers", static_cast<uint64_t>(r.registers));
  line += r.registers_exact ? ",\"registers_exact\":true" : ",\"registers_exact\":false";
  add("ptx_instructions", r.info.instructions);
  add("sass_instructions", r.sass_instructions);
  const int blocks = active_blocks(r, static_cast<int>(volume(launch.block)), launch.shared);
  add("blocks_per_multiprocessor", static_cast<uint64_t>(blocks));
  add("active_clusters", static_cast<uint64_t>(active_clusters(blocks, static_cast<int>(volume(launch.cluster)))));
#define ADD(field) add(#field, p.field)
  ADD(warp_instructions);
  ADD(thread_instructions);
  ADD(busiest_cluster_instructions);
  ADD(integer);
  ADD(fp32);
  ADD(half);
  ADD(convert);
  ADD(special);
  ADD(control);
  ADD(mma);
  ADD(load_global);
  ADD(store_global);
  ADD(load_shared);
  ADD(store_shared);
  ADD(load_local);
  ADD(store_local);
  ADD(load_const);
  ADD(async_copy);
  ADD(barrier);
  ADD(shuffle);
  ADD(atomic);
  ADD(mma_flops);
  ADD(tcgen05_flops);
  ADD(tcgen05_wavefronts);
  ADD(global_sectors_read);
  ADD(global_sectors_written);
  ADD(global_sectors_read_ideal);
  ADD(global_sectors_written_ideal);
  ADD(unique_bytes_read);
  ADD(unique_bytes_written);
  ADD(shared_wavefronts);
  ADD(shared_wavefronts_ideal);
  ADD(async_sectors_read);
  ADD(async_sectors_received);
  ADD(constant_wavefronts);
#undef ADD
  char seconds[64];
  std::snprintf(seconds, sizeof seconds, ",\"seconds\":%.6f", p.seconds);
  line += seconds;
  if (const char* test = std::getenv("PYTEST_CURRENT_TEST")) line += ",\"test\":" + json_string(test);
  if (result.fault != Fault::none) line += ",\"fault\":" + json_string(result.message);
  line += "}\n";
  if (write(file, line.data(), line.size()) < 0) complain("cannot write the profile");
}

cudaError_t error_for(const LaunchResult& result) {
  switch (result.fault) {
    case Fault::none:
      return cudaSuccess;
    case Fault::unsupported_instruction:
      return cudaErrorNotSupported;
    case Fault::global_out_of_bounds:
    case Fault::shared_out_of_bounds:
      return cudaErrorIllegalAddress;
    case Fault::misaligned:
      return cudaErrorMisalignedAddress;
    case Fault::uninitialized_shared:
    case Fault::shared_race:
    case Fault::grid_race:
    case Fault::grid_same_value:
    case Fault::non_coherent:
    case Fault::registers:
    case Fault::shared_lifetime:
    case Fault::tensor_memory:
      return cudaErrorLaunchFailure;
    case Fault::barrier_deadlock:
      return cudaErrorLaunchTimeout;
    case Fault::bad_launch:
      return cudaErrorInvalidConfiguration;
    case Fault::trap:
      return result.message.find("ssert") != std::string::npos ? cudaErrorAssert : cudaErrorLaunchFailure;
    case Fault::internal:
      return cudaErrorUnknown;
  }
  return cudaErrorUnknown;
}

// The checks of cudaLaunchKernel itself.
cudaError_t check(const Launch& launch, const Resources& r, const std::string& kernel) {
  const dim3 g = launch.grid, b = launch.block, c = launch.cluster;
  const uint64_t threads = volume(b);
  const auto refuse = [&kernel](cudaError_t error, const std::string& why) {
    return report(error, "kernel " + kernel + ": " + why);
  };
  if (volume(g) == 0 || threads == 0)
    return refuse(cudaErrorInvalidConfiguration, "empty launch, grid " + text(g) + ", block " + text(b));
  if (g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535)
    return refuse(cudaErrorInvalidConfiguration, "grid " + text(g) + " is too large");
  if (b.x > 1024 || b.y > 1024 || b.z > 64 || threads > 1024)
    return refuse(cudaErrorInvalidConfiguration, "block " + text(b) + " is too large");
  if (threads > r.info.max_threads)
    return refuse(cudaErrorInvalidValue, "block " + text(b) + " exceeds its launch bound of " +
                                             std::to_string(r.info.max_threads) + " threads");
  const uint64_t warps = (threads + 31) / 32;
  if (r.registers_exact &&
      warps * ((static_cast<uint64_t>(r.registers) * 32 + 255) / 256 * 256) > DeviceSpec::registers)
    return refuse(cudaErrorLaunchOutOfResources,
                  std::to_string(threads) + " threads with " + std::to_string(r.registers) + " registers each");
  if (launch.shared > r.max_dynamic_shared)
    return refuse(cudaErrorInvalidValue, std::to_string(launch.shared) + " bytes of dynamic shared memory, at most " +
                                             std::to_string(r.max_dynamic_shared) +
                                             " without a larger cudaFuncAttributeMaxDynamicSharedMemorySize");
  if (volume(c) != 1) {
    if (device().arch < 90) return refuse(cudaErrorNotSupported, "clusters need sm_90");
    if (cluster_support() != Clusters::work)
      return refuse(cudaErrorInvalidClusterSize, "CUDASIM_CLUSTERS refuses clusters");
    if (volume(c) == 0 || g.x % c.x || g.y % c.y || g.z % c.z)
      return refuse(cudaErrorInvalidConfiguration, "grid " + text(g) + " is not a multiple of cluster " + text(c));
    if (volume(c) > (r.non_portable_cluster ? 16u : 8u))
      return refuse(cudaErrorInvalidClusterSize, "cluster " + text(c));
    if (active_clusters(active_blocks(r, static_cast<int>(threads), launch.shared), static_cast<int>(volume(c))) == 0)
      return refuse(cudaErrorInvalidClusterSize, "no GPC has room for a cluster " + text(c));
  }
  if (launch.cooperative &&
      volume(g) >
          static_cast<uint64_t>(active_blocks(r, static_cast<int>(threads), launch.shared)) * device().multiprocessors)
    return refuse(cudaErrorCooperativeLaunchTooLarge, "grid " + text(g));
  return cudaSuccess;
}

// A copy of a launch's arguments, for a graph.
struct Arguments {
  std::vector<std::vector<char>> bytes;
  std::vector<void*> pointers;
  Arguments(void* const* args, const KernelInfo& info) {
    for (size_t i = 0; i < info.param_sizes.size(); ++i) {
      const char* p = static_cast<const char*>(args[i]);
      bytes.emplace_back(p, p + info.param_sizes[i]);
    }
    for (std::vector<char>& b : bytes) pointers.push_back(b.data());
  }
};

cudaError_t execute(Function* function, const Resources& r, const Launch& launch);

cudaError_t run(const void* host, const Launch& launch) {
  if (const cudaError_t error = context_error()) return error;
  Function* function = find_function(host);
  if (!function) return report(cudaErrorInvalidDeviceFunction);
  Resources r;
  if (const cudaError_t error = resources(*function, &r)) return error;
  if (const cudaError_t error = check(launch, r, name_of(*function))) return error;
  if (any_capture()) {
    const auto arguments = std::make_shared<Arguments>(launch.args, r.info);
    const auto node = [function, r, arguments, launch] {
      Launch again = launch;
      again.args = arguments->pointers.data();
      return execute(function, r, again);
    };
    cudaError_t error;
    if (captured(launch.stream, cudaGraphNodeTypeKernel, node, &error)) return error;
  }
  return execute(function, r, launch);
}

std::mutex one_at_a_time;  // for launches
struct LastLaunch {
  cudaStream_t stream;
  std::shared_ptr<const Unfinished> unfinished;
};
LastLaunch& last_launch() {
  static LastLaunch& last = *new LastLaunch{};
  return last;
}

cudaError_t execute(Function* function, const Resources& r, const Launch& launch) {
  const std::string name = name_of(*function);
  std::string unused;
  Kernel* kernel = load(*function, &unused);

  LaunchConfig config;
  config.grid = {launch.grid.x, launch.grid.y, launch.grid.z};
  config.block = {launch.block.x, launch.block.y, launch.block.z};
  config.cluster = {launch.cluster.x, launch.cluster.y, launch.cluster.z};
  config.dynamic_shared_bytes = static_cast<uint32_t>(launch.shared);
  config.registers = r.registers_exact ? static_cast<uint32_t>(r.registers) : 0;
  config.arch = device().arch;
  config.args = launch.args;

  const std::lock_guard lock(one_at_a_time);
  if (launch.dependent && launch.stream == last_launch().stream) config.after = last_launch().unfinished;
  if (logging())
    log("launch %s grid %s block %s shared %zu", demangle(name.c_str()).c_str(), text(launch.grid).c_str(),
        text(launch.block).c_str(), launch.shared);
  LaunchResult result = cudasim::launch(kernel, config);
  last_launch() = {launch.stream, std::move(result.unfinished)};
  if (const size_t at = result.message.find(name); at != std::string::npos)
    result.message.replace(at, name.size(), demangle(name.c_str()));
  write_profile(result.profile, name.c_str(), launch, r, result);
  if (result.fault == Fault::none) return cudaSuccess;
  return report_kernel_fault(error_for(result), result.message);
}

struct PendingConfiguration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local std::vector<PendingConfiguration> configurations;

}  // namespace

void finish_launches() {
  const std::lock_guard lock(one_at_a_time);
  last_launch().unfinished.reset();
}

}  // namespace cudasim::runtime

using namespace cudasim::runtime;

CUDASIM_API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
CUDASIM_API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (configurations.empty()) return report(cudaErrorMissingConfiguration);
  const PendingConfiguration c = configurations.back();
  configurations.pop_back();
  *grid = c.grid;
  *block = c.block;
  *shared = c.shared;
  *static_cast<cudaStream_t*>(stream) = c.stream;
  return cudaSuccess;
}

CUDASIM_API cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** args, size_t shared,
                                         cudaStream_t stream) {
  Launch launch;
  launch.grid = grid;
  launch.block = block;
  launch.shared = shared;
  launch.stream = stream;
  launch.args = args;
  return run(host, launch);
}
CUDASIM_API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared,
                                           cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, args, shared, stream);
}
CUDASIM_API cudaError_t cudaLaunchCooperativeKernel(const void* host, dim3 grid, dim3 block, void** args, size_t shared,
                                                    cudaStream_t stream) {
  Launch launch;
  launch.grid = grid;
  launch.block = block;
  launch.shared = shared;
  launch.stream = stream;
  launch.args = args;
  launch.cooperative = true;
  return run(host, launch);
}
CUDASIM_API CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                                    unsigned by, unsigned bz, unsigned shared, CUstream stream, void** args,
                                    void** extra) {
  if (extra) return CUDA_ERROR_NOT_SUPPORTED;
  return static_cast<CUresult>(cudaLaunchKernel(function, dim3(gx, gy, gz), dim3(bx, by, bz), args, shared, stream));
}
CUDASIM_API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host, void** args) {
  Launch launch;
  launch.grid = config->gridDim;
  launch.block = config->blockDim;
  launch.shared = config->dynamicSmemBytes;
  launch.stream = config->stream;
  launch.args = args;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& a = config->attrs[i];
    if (a.id == cudaLaunchAttributeClusterDimension)
      launch.cluster = dim3(a.val.clusterDim.x, a.val.clusterDim.y, a.val.clusterDim.z);
    else if (a.id == cudaLaunchAttributeCooperative)
      launch.cooperative = a.val.cooperative != 0;
    else if (a.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      launch.dependent = a.val.programmaticStreamSerializationAllowed != 0;
  }
  if (launch.dependent && device().arch < 90)
    return report(cudaErrorNotSupported, "programmatic dependent launches need sm_90");
  return run(host, launch);
}
