# Sourced by scripts/wheels and scripts/release: $tools, a virtual environment with what makes wheels.
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
tools=$PWD/build/tools
command -v g++ >/dev/null || fail "please install g++, and g++-aarch64-linux-gnu for aarch64"
[[ -x $tools/bin/python ]] || "$base_python" -m venv "$tools"
"$tools/bin/python" -m pip install --quiet --require-hashes -r scripts/packaging/tools.txt
export PATH=$tools/bin:$PATH
if [[ -z ${QLORA_TORCH_ROOT:-} ]]; then
  "$tools/bin/python" -m pip install --quiet --no-deps "torch>=2.11,<3"
  QLORA_TORCH_ROOT=$("$tools/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["platlib"] + "/torch")')
  export QLORA_TORCH_ROOT
fi
