# Sourced by the scripts beside it: a virtual environment with qlora_ext in it, made from nothing on Debian or Ubuntu.
#   QLORA_VENV    where it lies (default: .venv in the project)
#   QLORA_PYTHON  the Python >= 3.10 to make it with (default: python3)
#   QLORA_TORCH   the PyTorch to install (default: "torch>=2.11,<3")
# The compiled files stay in build/, for each Python its own, so that the next script compiles only what has changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${QLORA_VENV:-$PWD/.venv}
base_python=${QLORA_PYTHON:-python3}
torch_requirement=${QLORA_TORCH:-torch>=2.11,<3}
# pip would compile each file of each package. Python compiles a module when it is first imported. (pip wants a 0 for its
# negative options.)
export PIP_NO_COMPILE=0

fail() {
  echo "$0: $*" >&2
  exit 2
}

as_root() {
  if [[ $(id -u) == 0 ]]; then
    DEBIAN_FRONTEND=noninteractive "$@"
  elif command -v sudo >/dev/null; then
    sudo DEBIAN_FRONTEND=noninteractive "$@"
  else
    fail "as root, please run: $*"
  fi
}

# What compiling needs and a bare system lacks.
install_system_packages() {
  local missing=()
  command -v "$base_python" >/dev/null || missing+=(python3)
  command -v g++ >/dev/null || missing+=(g++)
  "$base_python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
  "$base_python" -c 'import os, sysconfig; assert os.path.exists(sysconfig.get_path("include") + "/Python.h")' \
    2>/dev/null || missing+=(python3-dev)
  ((${#missing[@]})) || return 0
  command -v apt-get >/dev/null || fail "please install: ${missing[*]}"
  echo "installing ${missing[*]}"
  as_root apt-get update -qq
  as_root apt-get install -y -qq "${missing[@]}" >/dev/null
}

# Makes $venv, with what compiles qlora_ext. pip's own build environment would lie elsewhere each time, and scikit-build-core
# then compiles everything again.
make_build_environment() {
  install_system_packages
  "$base_python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "Python 3.10 or newer is needed"
  echo "installing the build tools into $venv"
  [[ -x $venv/bin/python ]] || "$base_python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --upgrade "pip<27"
  "$venv/bin/python" -m pip install --quiet "scikit-build-core>=0.11,<2" "pybind11>=2.13,<4" "cmake>=3.26,<5" "ninja>=1.10,<2"
}

# The same with PyTorch.
make_environment() {
  make_build_environment
  echo "installing PyTorch (the first time it is downloaded: minutes)"
  "$venv/bin/python" -m pip install --quiet "$torch_requirement"
}

# build_with_progress COMMAND...: shows how many files are compiled, and everything only if it fails. By itself, Ninja would
# compile two files more at once than there are cores, and the longest one would end long after the others.
build_with_progress() {
  local log status=0
  log=$(mktemp)
  CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)} "$@" 2>&1 | tee "$log" | show_ninja || status=$?
  ((status == 0)) || cat "$log" >&2
  rm -f "$log"
  return "$status"
}
show_ninja() {
  local line end=$'\n' last=-1
  [[ ! -t 1 ]] || end=$'\r'
  while IFS= read -r line; do
    [[ $line != *"-- no nvcc found"* ]] || echo "${line#*-- }"
    [[ $line =~ ^\ *\[([0-9]+)/([0-9]+)\]\  ]] || continue
    local percent=$((100 * BASH_REMATCH[1] / BASH_REMATCH[2]))
    [[ $end == $'\r' || $((percent / 10)) != $((last / 10)) ]] || continue
    printf 'compiled %s of %s files%s' "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}" "$end"
    last=$percent
  done
  [[ $end == $'\n' || $last == -1 ]] || echo
}

# install_packages EXTRA [PACKAGE...]: PyTorch, what the extra requires, and the packages without what they require.
install_packages() {
  local required
  mapfile -t required < <("$venv/bin/python" scripts/requirements.py "$1")
  "$venv/bin/python" -m pip install --quiet "$torch_requirement" "${required[@]}"
  [[ $# == 1 ]] || "$venv/bin/python" -m pip install --quiet --no-deps "${@:2}"
}

# compile_kernels FOLDER [CMAKE ARGUMENT...]: the part of the build that needs no PyTorch, which is nearly all of it.
compile_kernels() {
  local log sets
  log=$("$venv/bin/cmake" -S . -B "$1" -G Ninja "-DCMAKE_MAKE_PROGRAM=$venv/bin/ninja" -DCMAKE_BUILD_TYPE=Release \
    -DQLORA_KERNELS_ONLY=ON "${@:2}" 2>&1) || { echo "$log" >&2 && return 1; }
  sets=$(sed -n 's/^-- CPU instruction sets: //p' <<<"$log")
  echo "compiling the CPU kernels for ${sets//;/, }"
  build_with_progress "$venv/bin/cmake" --build "$1"
}

# CMake's options for the GPUs that PyTorch can use here. The CUDA kernels for all take a quarter of an hour.
cuda_options() {
  "$venv/bin/python" -c '
import torch
gpus = torch.cuda.device_count() if torch.version.cuda and torch.cuda.is_available() else 0
majors = {major for major, minor in map(torch.cuda.get_device_capability, range(gpus)) if (major, minor) >= (7, 5)}
archs = ";".join("75-real" if major == 7 else f"{major}0-real" for major in sorted(majors))
print(f"-DQLORA_CUDA=AUTO -DQLORA_CUDA_ARCHS={archs}" if archs else "-DQLORA_CUDA=OFF")'
}

# install_qlora_ext EXTRA [PACKAGE...]: into $venv, from this tree, compiled for this machine alone; with the packages. These
# are downloaded and installed while the kernels are compiled.
install_qlora_ext() {
  local build source packages arguments=()
  make_build_environment
  build=build/$("$venv/bin/python" -c 'import sys; print(sys.implementation.cache_tag)')
  source=$(sed -n 's/^CMAKE_HOME_DIRECTORY:INTERNAL=//p' "$build/CMakeCache.txt" 2>/dev/null || true)
  [[ -z $source || $source -ef . ]] || rm -rf "$build" # of a clone that this one is a copy of
  read -ra arguments <<<"${CMAKE_ARGS:-}"
  echo "installing PyTorch and other packages in the background (the first time they are downloaded: minutes)"
  mkdir -p "$build"
  set -m # a process group of its own, which can be ended
  (
    install_packages "$@"
    cuda_options >"$build/cuda_options"
  ) &
  packages=$!
  set +m
  trap "kill -- -$packages 2>/dev/null" EXIT
  compile_kernels "$build" -DQLORA_CPU_ISAS=native "${arguments[@]}"
  ! kill -0 "$packages" 2>/dev/null || echo "waiting for the packages"
  wait "$packages" || fail "the packages could not be installed: see above"
  trap - EXIT
  echo "compiling the operators"
  CMAKE_ARGS="-DQLORA_KERNELS_ONLY=OFF -DQLORA_CPU_ISAS=native $(<"$build/cuda_options") ${CMAKE_ARGS:-}" build_with_progress \
    "$venv/bin/python" -m pip install --verbose --no-build-isolation --config-settings "build-dir=$build" ".[$1]"
}

# Makes $venv with a CUDA build of PyTorch and what the CUDA tests import, and puts nvcc on PATH: the system's where it is of
# CUDA 13, or else that of NVIDIA's packages, which fit the CUDA of PyTorch.
make_cuda_environment() {
  local cuda home release
  make_environment
  "$venv/bin/python" -m pip install --quiet "numpy<3" "pytest>=8,<10" "pytest-xdist>=3.6,<4" "hypothesis>=6,<7"
  cuda=$("$venv/bin/python" -c 'import torch; print(torch.version.cuda)')
  [[ $cuda == 13.* ]] || fail "$venv needs a PyTorch for CUDA 13, as PyPI has it, but pip installed one for CUDA $cuda:" \
    "PIP_CONFIG_FILE=/dev/null ignores pip's settings"
  export PATH=$venv/bin:$PATH
  release=$({ nvcc --version || true; } 2>/dev/null | sed -n 's/.*release \([0-9]*\)\..*/\1/p')
  ((${release:-0} < 13)) || return 0
  echo "installing nvcc $cuda into $venv"
  "$venv/bin/python" -m pip install --quiet "nvidia-cuda-nvcc==$cuda.*" "nvidia-nvvm==$cuda.*" "nvidia-cuda-crt==$cuda.*" \
    "nvidia-cuda-cccl==$cuda.*"
  home=$("$venv/bin/python" -c 'import nvidia; print(next(iter(nvidia.__path__)))')/cu13
  ln -sfn lib "$home/lib64" # where nvcc and CMake look for libraries
  ln -sf libcudart.so.13 "$home/lib/libcudart.so"
  printf '#!/bin/sh\nexec "%s/bin/nvcc" "$@"\n' "$home" >"$venv/bin/nvcc"
  chmod +x "$venv/bin/nvcc"
}

# install_qlora_ext_cuda [CMAKE ARGUMENT...]: what `make_cuda_environment` makes, with qlora_ext in it.
install_qlora_ext_cuda() {
  make_cuda_environment
  CMAKE_ARGS="-DQLORA_CUDA=ON $*" build_with_progress "$venv/bin/python" -m pip install --verbose --no-build-isolation --no-deps \
    --config-settings build-dir=build/cuda .
}

simulator=$PWD/tests/cudasim/cudasim
# The simulator interprets PTX. That of one architecture is enough for all devices since compute capability 8.0; for 7.5,
# simulate_arch adds its own. Machine code and the CPU kernels of newer processors, which take longest to compile, are left
# out.
simulated_options=("-DQLORA_CUDA_ARCHS=90-virtual" -DQLORA_CPU_ISAS=avx2)
simulate_arch() {
  [[ $1 != 75 ]] || simulated_options[0]="-DQLORA_CUDA_ARCHS=75-virtual;90-virtual"
}
simulated_torch=${QLORA_TORCH:-torch==2.11.*} # the simulator replaces its operators, by functions that are no public interface
has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus >/dev/null 2>&1; }
require_simulator() {
  [[ $(uname -sm) == "Linux x86_64" ]] || fail "there is no GPU, and the kernel simulator needs Linux on x86-64"
}
