#!/usr/bin/env bash
# A job on the hosts of a hostfile, started from one of them over ssh: see README.md beside it.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"

usage="usage: run.sh --hostfile FILE [--head ADDRESS] [--port N] [--venv-script FILE] [--max-restarts N]
              [--dry-run [--gpu MODEL]] -- RECIPE [--set a.b=value ...] --out DIR"

hostfile="" head="" port=29500 venv="" restarts=3 dry_run=false gpu=""
while [[ $# -gt 0 && $1 != -- ]]; do
    case $1 in
        --dry-run) dry_run=true; shift; continue ;;
        --help | -h) echo "$usage"; exit 0 ;;
        --hostfile | --head | --port | --venv-script | --max-restarts | --gpu) ;;
        *) fastvit_fail "unknown option '$1' (arguments of the training go after --); $usage" ;;
    esac
    [[ $# -gt 1 ]] || fastvit_fail "$1 needs a value; $usage"
    case $1 in
        --hostfile) hostfile=$2 ;;
        --head) head=$2 ;;
        --port) port=$2 ;;
        --venv-script) venv=$2 ;;
        --max-restarts) restarts=$2 ;;
        --gpu) gpu=$2 ;;
    esac
    shift 2
done
[[ $# -gt 1 ]] || fastvit_fail "no recipe after --; $usage"
shift
[[ -n $hostfile ]] || fastvit_fail "--hostfile is missing; $usage"
[[ -r $hostfile ]] || fastvit_fail "there is no hostfile $hostfile"
[[ $restarts =~ ^[0-9]+$ ]] || fastvit_fail "--max-restarts is '$restarts': a number"
[[ -z $gpu ]] || $dry_run || fastvit_fail "--gpu is of --dry-run, for a host without the job's GPUs: leave it out"
[[ $port =~ ^[1-9][0-9]*$ ]] || fastvit_fail "--port is '$port': a number"
command -v pdsh >/dev/null || fastvit_fail "DeepSpeed's launcher needs pdsh: install it on this host"

# ---- the hosts
hosts=() slots=0 processes=0 number=0
while read -r host count rest || [[ -n ${host:-} ]]; do
    number=$((number + 1))
    [[ -n ${host:-} && $host != \#* ]] || continue
    [[ $count =~ ^slots=[1-9][0-9]*$ && (-z $rest || $rest == \#*) ]] ||
        fastvit_fail "line $number of $hostfile is no 'HOST slots=N'"
    [[ ${hosts[*]} == "" || " ${hosts[*]} " != *" $host "* ]] || fastvit_fail "$hostfile names $host twice"
    getent ahosts "$host" >/dev/null || fastvit_fail "line $number of $hostfile: no host is known by the name '$host'"
    hosts+=("$host")
    processes=$((processes + ${count#slots=}))
    slots=$((slots > ${count#slots=} ? slots : ${count#slots=}))
done <"$hostfile"
[[ ${#hosts[@]} -gt 0 ]] || fastvit_fail "$hostfile names no host"
head=${head:-${hosts[0]}}
fastvit_environment "$head" "${#hosts[@]}" "$slots"

# ---- what the other hosts are told
# A remote shell reads every argument once more, and pdsh its percent signs.
quoted=()
for argument in "$@" --resume auto; do
    if [[ $argument =~ ^[A-Za-z0-9_@+=:,./-]+$ ]]; then
        quoted+=("$argument")
    else
        argument=${argument//\\/\\\\}
        argument=${argument//\'/\\\'}
        argument=${argument//%/\\x25}
        argument=${argument//$'\n'/\\n}
        quoted+=("\$'${argument// /\\x20}'")
    fi
done

# DeepSpeed tells the launcher of each host no level. Ranks that end with 2 or 76 have said why in a sentence.
log_level=warning
quiet=(sed -u -E -e '/ \[INFO\] \[launch\.py:/d' -e '/ \[ERROR\] \[launch\.py:.* = (2|76)$/d')
[[ " $* " != *" --verbose "* ]] || log_level=info quiet=(cat)
command=(
    "$PYTHON" -m deepspeed.launcher.runner --hostfile "$hostfile" --launcher pdsh --force_multi --no_ssh_check
    --no_local_rank --master_addr "$HEAD_ADDRESS" --master_port "$port" --log_level "$log_level"
    --venv_script "$FASTVIT_LAUNCH/deepspeed/host.sh $(command -v "$PYTHON") $head ${#hosts[@]} $slots $venv"
    --module fastvit_engine train "${quoted[@]}"
)

# DeepSpeed passes on PYTHON* alone; this file adds what the user has set of what concerns the job.
write_deepspeed_env() {
    local name
    for name in $(compgen -e | grep -E '^(FASTVIT|NCCL|TORCH|GLOO|TRITON|OMP|CUDA|UCX|FI|HF|AWS|PYTORCH)_' || true); do
        [[ -z ${FASTVIT_CHOSEN[$name]:-} ]] || continue # every host chooses for itself
        [[ ${!name} =~ ^[A-Za-z0-9_@+=:,./\ -]*$ ]] ||
            fastvit_fail "\$$name holds a character that DeepSpeed does not pass on: set it in --venv-script instead"
        echo "$name=${!name}"
    done
}
variables=$(write_deepspeed_env)

if $dry_run; then
    fastvit_check "$processes" "$slots" "$gpu" "$@"
    fastvit_show "${command[@]}"
    secret='^([A-Za-z0-9_]*(KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL)[A-Za-z0-9_]*)=.*'
    [[ -z $variables ]] || printf '# passed on to every host:\n%s\n' "$(sed -E "s/$secret/\\1=... (not shown)/" <<<"$variables")"
    exit 0
fi

for host in "${hosts[@]}"; do
    # shellcheck disable=SC2086  # PDSH_SSH_ARGS_APPEND holds several words
    ssh -n -o BatchMode=yes -o ConnectTimeout=10 ${PDSH_SSH_ARGS_APPEND:-} "$host" "test -r '$FASTVIT_LAUNCH'" ||
        fastvit_fail "$host cannot be used: ssh must need no password, and $FASTVIT_LAUNCH must be there too (see above)"
done

DS_ENV_FILE=$(mktemp) # mode 600: it may hold secrets
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
echo "$variables" | sed '/^$/d; /^FASTVIT_RUN_ID=/d' >"$DS_ENV_FILE"
# A restart takes the run over from the job before at once.
echo "FASTVIT_RUN_ID=deepspeed-$(hostname)-$$-$(date +%s)" >>"$DS_ENV_FILE"

# ---- the job, and again after a failure that a restart may cure
stopping=false
for ((attempt = 0; ; attempt++)); do
    "${command[@]}" > >(trap '' INT TERM HUP; exec "${quiet[@]}") & # which outlives a signal to all
    runner=$!
    trap 'fastvit_trapped=true stopping=true; kill -TERM $runner 2>/dev/null || true' TERM INT
    code=0
    fastvit_wait "$runner" || code=$?
    if $stopping || [[ $attempt -ge $restarts || ! ($code == 75 || $code -ge 128) ]]; then
        exit "$code"
    fi
    echo "launch: the job ended with $code: restart $((attempt + 1)) of $restarts" >&2
done
