// The module `_C`: build info, the CPU kernels in use, and the formats on numpy arrays. It does not depend on torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>

#include "build_info.h"
#include "cpp/cpu/check.h"
#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/isa/isa.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens/grid.h"
#include "cpp/cpu/tuning.h"
#include "cpp/format/code_name.h"
#include "cpp/format/dynamic8.h"
#include "cpp/format/print_kernels.h"
#include "cuda/tuning/forced.h"

namespace py = pybind11;
using namespace qlora;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// Without torch there is no thread pool, so these functions use one thread.
const cpu::Pool kOneThread = {[](int64_t count, int64_t, cpu::Pool::Body body, void* context) {
                                if (count) body(context, 0, count);
                                return true;
                              },
                              1};

void require(bool ok, const std::string& text) {
  if (!ok) throw py::value_error(text);
}

void check_block_size(int64_t block_size) {
  require(is_block_size(block_size), "block_size: expected a power of two from " + std::to_string(kMinBlockSize) +
                                         " to " + std::to_string(kMaxBlockSize) + ", got " +
                                         std::to_string(block_size));
}

void check_nested_block_size(int64_t nested_block_size) {
  require(is_nested_block_size(nested_block_size), "nested_block_size: expected an integer from 1 to " +
                                                       std::to_string(kMaxNestedBlockSize) + ", got " +
                                                       std::to_string(nested_block_size));
}

Code code_of(const std::string& name) {
  Code code = Code::kNf4;
  const std::string error = find_code(name.c_str(), &code);
  require(error.empty(), error);
  return code;
}

// For the codec on numpy arrays.
Code code_of_4_bits(const std::string& name) {
  const Code code = code_of(name);
  require(!is_wide(code), "code: expected a code of 4 bits, got " + name);
  return code;
}

void check_count(const char* name, int64_t got, int64_t expected) {
  require(got == expected,
          std::string(name) + ": expected " + std::to_string(expected) + " elements, got " + std::to_string(got));
}

py::tuple quantize_nf4(const Array<float>& w, int64_t block_size, const std::string& code) {
  check_block_size(block_size);
  Array<uint8_t> packed(packed_bytes(w.size()));
  Array<float> absmax(ceil_div(w.size(), block_size));
  cpu::check(cpu::quantize_nf4(kOneThread, code_of_4_bits(code), DType::kFloat32, w.data(), w.size(), block_size,
                               packed.mutable_data(), absmax.mutable_data()));
  return py::make_tuple(packed, absmax);
}

Array<float> dequantize_nf4(const Array<uint8_t>& packed, const Array<float>& absmax, int64_t numel, int64_t block_size,
                            const std::string& code, const std::optional<Array<float>>& offsets) {
  check_block_size(block_size);
  require(numel >= 0, "numel: expected 0 or more, got " + std::to_string(numel));
  check_count("packed", packed.size(), packed_bytes(numel));
  check_count("absmax", absmax.size(), ceil_div(numel, block_size));
  Array<float> out(numel);
  Weight w = {packed.data(), code_of_4_bits(code), float_scales(absmax.data(), block_size), 1, numel};
  if (offsets) {
    check_count("offsets", offsets->size(), ceil_div(numel, block_size));
    w.scales.offsets = {OffsetForm::kFloat32, offsets->data(), nullptr};
  }
  cpu::check(cpu::dequantize_nf4(kOneThread, w, DType::kFloat32, out.mutable_data()));
  return out;
}

py::tuple quantize_absmax(const Array<float>& absmax, int64_t nested_block_size) {
  check_nested_block_size(nested_block_size);
  Array<uint8_t> codes(absmax.size());
  Array<float> nested_absmax(ceil_div(absmax.size(), nested_block_size));
  float offset = 0.0f;
  cpu::check(cpu::quantize_absmax(kOneThread, absmax.data(), absmax.size(), nested_block_size, codes.mutable_data(),
                                  nested_absmax.mutable_data(), &offset));
  return py::make_tuple(codes, nested_absmax, py::float_(offset));
}

Array<float> dequantize_absmax(const Array<uint8_t>& codes, const Array<float>& nested_absmax, float nested_offset,
                               int64_t nested_block_size) {
  check_nested_block_size(nested_block_size);
  check_count("nested_absmax", nested_absmax.size(), ceil_div(codes.size(), nested_block_size));
  Array<float> absmax(codes.size());
  const Scales scales =
      nested_scales(codes.data(), nested_absmax.data(), &nested_offset, kMinBlockSize, nested_block_size);
  cpu::check(cpu::dequantize_absmax(kOneThread, scales, codes.size(), absmax.mutable_data()));
  return absmax;
}

py::dict build_info() {
  py::dict d;
  d["version"] = QLORA_VERSION;
  d["compiler"] = QLORA_CXX;
  d["torch_headers"] = QLORA_TORCH_HEADERS;
  d["cuda_built"] = bool(QLORA_HAVE_CUDA);
  d["cuda_archs"] = QLORA_CUDA_ARCHS;
  d["nvcc"] = QLORA_NVCC;
  py::list isas;
  for (const cpu::Isa* isa : cpu::kIsas)
    if (cpu::compiled(*isa)) isas.insert(0, isa->name);
  d["cpu_isas_built"] = isas;
  return d;
}

py::list cpu_isas() {
  py::list names;
  for (const cpu::Isa* isa : cpu::kIsas)
    if (cpu::supported(*isa)) names.insert(0, isa->name);
  return names;
}

const char* cpu_isa() {
  if (const char* error = cpu::isa_error()) throw py::value_error(error);
  return cpu::current_isa().name;
}

cpu::Cpu cpu_of(const std::optional<std::string>& isa) {
  if (!isa) {
    cpu_isa();
    return cpu::current_cpu();
  }
  const cpu::Isa* const found = cpu::find_isa(isa->c_str());
  require(found, "isa: expected " + std::string(cpu::isa_names()) + ", got " + *isa);
  return {found->needs, cpu::current_cpu().intel, true, true, cpu::current_cpu().integers};
}

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64};
DType dtype_of(const std::string& name) {
  for (const DType dtype : kDTypes)
    if (name == dtype_name(dtype)) return dtype;
  throw py::value_error("dtype: expected float32, bfloat16, float16 or float64, got " + name);
}

// Calls answer(problem) with a problem of the operator.
template <class Answer>
auto with_problem_of(const std::string& op, const Answer& answer) {
  if (op == "linear_nf4") return answer(LinearProblem{});
  if (op == "linear_nf4_dx") return answer(LinearDxProblem{});
  require(op == "linear_nf4_dlora", "op: expected linear_nf4, linear_nf4_dx or linear_nf4_dlora, got " + op);
  return answer(LoraGradProblem{});
}

template <class Problem>
void set_sizes(Problem* problem, int64_t m, int64_t n, int64_t k) {
  problem->m = m;
  if constexpr (requires { problem->w; }) {
    problem->w.n = n, problem->w.k = k;
  } else {
    problem->n = n, problem->k = k;
  }
}

// The CPU, or a card, given by the name of its architecture or by its attributes.
using DeviceArg = std::variant<std::string, std::map<std::string, int>>;

std::optional<cuda::Device> cuda_device_of(const DeviceArg& arg) {
  if (const auto* const name = std::get_if<std::string>(&arg)) {
    std::string names = "cpu";
    for (const cuda::Card& card : cuda::kCards) {
      if (*name == card.name) return card.device;
      names += ", " + std::string(card.name);
    }
    require(*name == "cpu", "device: expected " + names + " or a dict of a card's attributes, got " + *name);
    return std::nullopt;
  }
  auto attributes = std::get<std::map<std::string, int>>(arg);
  cuda::Device device;
  const std::pair<const char*, int*> fields[] = {{"arch", &device.arch},
                                                 {"sm_count", &device.sm_count},
                                                 {"shared_per_cta", &device.shared_per_cta},
                                                 {"l2_bytes", &device.l2_bytes}};
  for (const auto& [key, value] : fields) {
    const auto found = attributes.find(key);
    require(found != attributes.end() && found->second > 0,
            std::string("device: expected a dict with arch, sm_count, shared_per_cta and l2_bytes, each 1 or more; ") +
                key + (found == attributes.end() ? " is missing" : " is " + std::to_string(found->second)));
    *value = found->second;
    attributes.erase(found);
  }
  int integrated = 0;
  const std::pair<const char*, int*> optional[] = {{"clock_khz", &device.clock_khz},
                                                   {"memory_clock_khz", &device.memory_clock_khz},
                                                   {"bus_bits", &device.bus_bits},
                                                   {"integrated", &integrated}};
  for (const auto& [key, value] : optional) {
    const auto found = attributes.find(key);
    if (found == attributes.end()) continue;
    require(found->second >= 0,
            std::string("device: expected ") + key + " of 0 or more, got " + std::to_string(found->second));
    *value = found->second;
    attributes.erase(found);
  }
  device.is_integrated = integrated != 0;
  require(attributes.empty(),
          "device: expected arch, sm_count, shared_per_cta and l2_bytes, and perhaps clock_khz, "
          "memory_clock_khz, bus_bits and integrated, got " +
              (attributes.empty() ? "" : attributes.begin()->first));
  device.has_clusters = device.arch >= 90;
  if (device.arch == 90 || device.arch / 10 == 10) device.resident_clusters = cuda::estimated_clusters(device.sm_count);
  return device;
}

py::list choose(const std::string& op, const std::string& dtype, int64_t m, int64_t n, int64_t k, int64_t block_size,
                const std::optional<std::string>& isa, const std::string& code, const DeviceArg& device,
                const std::string& kernel, const std::string& activations_name) {
  check_block_size(block_size);
  Activations activations = Activations::kExact;
  const std::string error = find_activations(activations_name.c_str(), &activations);
  require(error.empty(), error);
  for (const auto& [name, count] : {std::pair{"m", m}, {"n", n}, {"k", k}})
    require(count >= 0, std::string(name) + ": expected 0 or more, got " + std::to_string(count));
  const std::optional<cuda::Device> card = cuda_device_of(device);
  require(!card || !isa, "isa: expected None with a CUDA device, which has no CPU instruction set");
  require(!card || dtype != "float64", "dtype: expected float32, bfloat16 or float16 on CUDA, got float64");
  require(card || kernel.empty(), "kernel: expected none for the CPU, got " + kernel);
  const std::optional<cpu::Cpu> cpu = card ? std::nullopt : std::optional(cpu_of(isa));
  return with_problem_of(op, [&](auto problem) {
    problem.dtype = dtype_of(dtype);
    set_sizes(&problem, m, n, k);
    if constexpr (requires { problem.w; }) {
      problem.w.scales.block_size = block_size;
      problem.w.code = code_of(code);
      problem.activations = activations;
    }
    py::list names;
    if (card) {
      const cuda::Choice chosen =
          kernel.empty() ? cuda::choose(problem, *card) : cuda::choose_forced(kernel, op.c_str(), problem, *card);
      names.append(cuda::kernel_name(chosen.kernel));
    } else {
      for (const cpu::Kernel chosen : cpu::choose(problem, *cpu)) names.append(cpu::kernel_name(chosen));
    }
    return names;
  });
}

// How the kernels for many tokens cut a product for a number of threads.
py::dict task_grid(const std::string& op, int64_t threads, int64_t m, int64_t n, int64_t k, int64_t lanes,
                   int64_t accumulators) {
  for (const auto& [name, count] : {std::pair{"threads", threads}, {"lanes", lanes}, {"accumulators", accumulators}})
    require(count >= 1, std::string(name) + ": expected 1 or more, got " + std::to_string(count));
  for (const auto& [name, count] : {std::pair{"m", m}, {"n", n}, {"k", k}})
    require(count >= 0, std::string(name) + ": expected 0 or more, got " + std::to_string(count));
  const cpu::VectorUnit unit{lanes, accumulators};
  py::dict found;
  with_problem_of(op, [&](auto problem) {
    if constexpr (std::is_same_v<decltype(problem), LoraGradProblem>) {
      const int64_t columns = cpu::dlora_columns(threads, unit, k, n);
      found["tasks"] = cpu::dlora_tasks(columns, k, n);
      found["critical_path"] = cpu::dlora_path(threads, columns, k, n);
      found["total"] = k + n + cpu::dlora_tasks(columns, k, n) * cpu::kCopyCost;
    } else {
      const bool is_dx = std::is_same_v<decltype(problem), LinearDxProblem>;
      const cpu::Sides sides = is_dx ? cpu::dx_sides(k, 4 * lanes, m, m) : cpu::forward_sides(unit, n, m);
      const cpu::Grid grid = cpu::make_grid(threads, cpu::kSpareRounds, sides);
      found["tasks"] = grid.tasks();
      found["rows"] = grid.rows.size;
      found["tokens"] = grid.tokens.size;
      found["critical_path"] = cpu::critical_path(threads, sides, grid);
      found["total"] = cpu::total_cost(sides, grid);
    }
  });
  return found;
}

// Lists the dtypes that each kernel accepts in a problem of ordinary sizes.
py::dict kernels(const std::string& op) {
  cpu_isa();
  return with_problem_of(op, [](auto problem) {
    set_sizes(&problem, 1, 64, 64);
    py::dict found;
    for (const cpu::KernelInfo& info : cpu::kKernelInfo) {
      py::list types;
      for (const DType dtype : kDTypes) {
        problem.dtype = dtype;
        if (cpu::serves(info.kernel, problem)) types.append(dtype_name(dtype));
      }
      found[info.name] = types;
    }
    return found;
  });
}

Array<float> table(const float* values, int64_t count) {
  Array<float> out(count);
  for (int64_t i = 0; i < count; ++i) out.mutable_data()[i] = values[i];
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "qlora_ext without torch: build info, kernel choice, and the 4-bit formats on numpy arrays.";
  m.def("build_info", &build_info, "What this package was compiled from and for.");
  m.def("cpu_isas", &cpu_isas, "Names of the instruction sets this processor can run the kernels with, worst first.");
  m.def("cpu_isa", &cpu_isa,
        "The instruction set in use: the best, or QLORA_CPU_ISA. Raises ValueError if it is not available.");
  m.def("choose", &choose, py::arg("op"), py::arg("dtype"), py::arg("m"), py::arg("n"), py::arg("k"),
        py::arg("block_size") = 64, py::arg("isa") = py::none(), py::arg("code") = "nf4", py::arg("device") = "cpu",
        py::arg("kernel") = "", py::arg("activations") = "exact",
        "The names of the kernels that a call of the operator `op` (\"linear_nf4\", \"linear_nf4_dx\" or "
        "\"linear_nf4_dlora\") on x [m, k] and w [n, k] of `dtype` tries in order, until one accepts its "
        "data. `device`: \"cpu\", or a card: \"sm80\", \"sm90\" and so on, or its attributes, {\"arch\": 90, "
        "\"sm_count\": 132, \"shared_per_cta\": 232448, \"l2_bytes\": 52428800}, and if known its clock_khz, "
        "memory_clock_khz, "
        "bus_bits and whether it is integrated (0 or 1); needs no card and no CUDA build. `isa`: "
        "as if QLORA_CPU_ISA forced that instruction set; by default the one in use. `kernel`: as if QLORA_CUDA_KERNEL "
        "forced that kernel.");
  m.def("task_grid", &task_grid, py::arg("op"), py::arg("threads"), py::arg("m"), py::arg("n"), py::arg("k"),
        py::arg("lanes") = 8, py::arg("accumulators") = 12,
        "How the kernels for many tokens cut a product of x [m, k] and w [n, k] for `threads` threads, without running "
        "it: the number of tasks; the most rows (dX: columns) and tokens of one; their total cost, in multiply-adds "
        "per element of the summed dimension, decoding and "
        "packing included; and the cost of the critical path, which is what the busiest thread computes. The defaults "
        "of `lanes` and `accumulators` are those of AVX2; AVX-512 has 16 and 24.");
  m.def("kernels", &kernels, py::arg("op"),
        "The name of every kernel -> the dtypes for which the instruction set in use has it, for the operator `op`.");
  m.def(
      "codes",
      [] {
        py::list names;
        for (const CodeTable& t : kCodeTables)
          if (!t.is_test) names.append(t.name);
        return names;
      },
      "Names of the 4-bit codes.");
  m.def(
      "wide_codes",
      [] {
        py::dict bits;
        for (const WideCode& t : kWideCodes) bits[t.name] = t.bits;
        return bits;
      },
      "The name of each code of more than 4 bits -> its bits.");
  m.def(
      "code_values",
      [](const std::string& code) {
        const Code found = code_of(code);
        const int count = 1 << bits_of(found);
        py::tuple tuple(count);
        for (int i = 0; i < count; ++i)
          tuple[i] = is_wide(found) ? wide_value(wide_code(found), i) : table_of(found).value[i];
        return tuple;
      },
      py::arg("code") = "nf4", "The values of a code, float32 numbers: 16, or 2^b of a code of b bits.");
  m.def(
      "block_sizes",
      [] {
        py::list sizes;
        for (int64_t size = kMinBlockSize; size <= kMaxBlockSize; size *= 2) sizes.append(size);
        return sizes;
      },
      "The block sizes of the format.");
  m.attr("MAX_NESTED_BLOCK_SIZE") = kMaxNestedBlockSize;
  m.attr("MAX_ELEMENTS") = kMaxElements;
  m.def("dynamic8_code", [] { return table(kDynamic8.value, 256); }, "The 256 values of the 8-bit scale map, float32.");
  m.def("quantize_nf4", &quantize_nf4, py::arg("w").noconvert(), py::arg("block_size") = 64, py::arg("code") = "nf4",
        "float32 array, any shape -> (packed uint8 [ceil(numel/2)], absmax float32 [ceil(numel/block_size)]).");
  m.def("dequantize_nf4", &dequantize_nf4, py::arg("packed").noconvert(), py::arg("absmax").noconvert(),
        py::arg("numel"), py::arg("block_size") = 64, py::arg("code") = "nf4",
        py::arg("offsets").noconvert() = py::none(),
        "packed, absmax and, of formats that have them, offsets (float32, one per block) -> float32 [numel].");
  m.def("quantize_absmax", &quantize_absmax, py::arg("absmax").noconvert(), py::arg("nested_block_size") = 256,
        "float32 absmax -> (codes uint8, nested_absmax float32, nested_offset float).");
  m.def("dequantize_absmax", &dequantize_absmax, py::arg("codes").noconvert(), py::arg("nested_absmax").noconvert(),
        py::arg("nested_offset"), py::arg("nested_block_size") = 256, "codes and nested scales -> float32 absmax.");
}
