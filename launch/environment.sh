# shellcheck shell=bash
# The environment of every launcher here: sourced, never run. Variables that the user has set are kept.
#
#   fastvit_environment HEAD NODES PROCESSES_PER_NODE    sets the variables, and HEAD_ADDRESS, OWN_ADDRESS, INTERFACE
#   fastvit_check PROCESSES PER_NODE GPU TRAINING...     --dry-run: checks the training; prints what a start would do
#   fastvit_show COMMAND...                              --dry-run: prints environment and command in shell syntax
#   fastvit_fail SENTENCE                                ends the script: bad input, exit code 2
#   fastvit_python                                       ends the script if PYTHON is not there
#   fastvit_wait PROCESS                                 waits for a child and returns its exit code, whatever traps run
#
# PYTHON is the interpreter of the ranks (default: python).

PYTHON=${PYTHON:-python}
FASTVIT_LAUNCH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
_fastvit_lines=()
# shellcheck disable=SC2034  # for the launcher that sources this
declare -A FASTVIT_CHOSEN=() # names of the variables that were not set before

fastvit_fail() {
    echo "launch: error: $1" >&2
    exit 2
}

fastvit_python() {
    command -v "$PYTHON" >/dev/null || fastvit_fail "there is no '$PYTHON' on the PATH: activate the environment, or set PYTHON"
}

# _fastvit_default NAME VALUE WHY
_fastvit_default() {
    local why=$3
    if [[ -n ${!1+set} ]]; then
        why="already set"
    else
        export "$1=$2"
        # shellcheck disable=SC2034
        FASTVIT_CHOSEN[$1]=1
    fi
    _fastvit_lines+=("$(printf 'export %s=%q  # %s' "$1" "${!1}" "$why")")
}

# The cores that this host, its container and its scheduler let a process use.
_fastvit_cores() {
    PYTHONPATH="$(dirname "$FASTVIT_LAUNCH")${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" -c \
        'from fastvit_engine.cores import cores_here; print(cores_here())'
}

fastvit_environment() {
    local head=$1 nodes=$2 processes=$3 alone=() route cores threads caches
    [[ $nodes == 1 ]] && alone=(--alone)
    fastvit_python
    route=$("$PYTHON" "$FASTVIT_LAUNCH/route.py" "$head" "${alone[@]}") || exit $?
    # shellcheck disable=SC2034  # for the launcher that sources this
    read -r HEAD_ADDRESS OWN_ADDRESS INTERFACE <<<"$route"

    # Of several networks, the one that leads to the head node; guesses from the host's name go wrong.
    _fastvit_default GLOO_SOCKET_IFNAME "$INTERFACE" "the interface towards $head"
    _fastvit_default NCCL_SOCKET_IFNAME "=$INTERFACE" "the same for NCCL; '=': this name, not all that begin so"

    # A dead peer is an error on all others, and says so.
    _fastvit_default TORCH_NCCL_ASYNC_ERROR_HANDLING 3 "a collective that fails or times out ends its process"
    _fastvit_default NCCL_DEBUG WARN "NCCL's reasons in the log"

    # The shared store of torchrun keeps the addresses of processes that a restart has replaced.
    _fastvit_default TORCH_DISABLE_SHARE_RDZV_TCP_STORE 1 "a new store after each restart"

    cores=$(_fastvit_cores) || exit $?
    threads=$((cores / processes))
    _fastvit_default OMP_NUM_THREADS "$((threads < 1 ? 1 : threads > 8 ? 8 : threads))" "$cores cores, processes: $processes"

    # Compiled code stays on the node: shared file systems are slow at many small files and at locks.
    caches=${TMPDIR:-/tmp}/fastvit-cache-$(id -u)
    _fastvit_default TRITON_CACHE_DIR "$caches/triton" "on this node's own disk"
    _fastvit_default TORCHINDUCTOR_CACHE_DIR "$caches/inductor" "likewise"
    _fastvit_default TORCH_EXTENSIONS_DIR "$caches/extensions" "likewise"
}

# A trap ends `wait`, not the child: every trap sets fastvit_trapped=true.
fastvit_wait() {
    local code again
    while :; do
        fastvit_trapped=false again=0
        wait "$1" || again=$?
        [[ $again -eq 127 ]] || code=$again # 127: it was already waited for when the trap ran
        $fastvit_trapped || return "${code:-127}"
    done
}

# PROCESSES: N or MIN:MAX. GPU: of other machines than this one, by name; "" if the job runs on such as this.
# Lines begin with "#", so that all that a dry run prints is a script.
fastvit_check() {
    local processes=$1 per_node=$2 gpu=$3 report
    shift 3
    "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("fastvit_engine") is None)' ||
        fastvit_fail "'$PYTHON' cannot import fastvit_engine: activate the environment, or set PYTHON"
    report=$("$PYTHON" -m fastvit_engine train "$@" --resume auto --dry-run \
        --processes "$processes" --processes-per-node "$per_node" ${gpu:+--gpu "$gpu"}) || exit $?
    # shellcheck disable=SC2001  # of every line
    sed 's/^/# /' <<<"$report"
}

fastvit_show() {
    printf '%s\n' "${_fastvit_lines[@]}"
    printf '%q ' "$@" | sed 's/ $//'
    echo
}
