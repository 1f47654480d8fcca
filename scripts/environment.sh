# Sourced by the scripts beside it: a virtual environment with qlora_ext in it, made from nothing on Debian or Ubuntu.
#   QLORA_VENV    where it lies (default: .venv in the project)
#   QLORA_PYTHON  the Python >= 3.10 to make it with (default: python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${QLORA_VENV:-$PWD/.venv}
base_python=${QLORA_PYTHON:-python3}

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

# install_qlora_ext EXTRA [PIP ARGUMENT...]: into $venv, from this tree.
install_qlora_ext() {
  local extra=$1
  shift
  install_system_packages
  "$base_python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "Python 3.10 or newer is needed"
  [[ -x $venv/bin/python ]] || "$base_python" -m venv "$venv"
  echo "installing into $venv (the first time brings PyTorch: minutes)"
  "$venv/bin/python" -m pip install --quiet --upgrade "pip<27"
  "$venv/bin/python" -m pip install --quiet "torch>=2.11,<3"
  "$venv/bin/python" -m pip install --quiet "$@" ".[$extra]"
}
