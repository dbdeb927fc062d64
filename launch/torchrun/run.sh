#!/usr/bin/env bash
# One node's part of a torchrun job. Run it on every node, with the same arguments: see README.md beside it.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"

usage="usage: run.sh --head HOST[:PORT] [--nodes N|MIN:MAX] [--processes-per-node N|gpu] [--max-restarts N]
              [--grace SECONDS] [--id NAME] [--dry-run [--gpu MODEL]] -- RECIPE [--set a.b=value ...] --out DIR"

head="" nodes=1 processes="" restarts=3 grace=120 id=fastvit dry_run=false gpu=""
while [[ $# -gt 0 && $1 != -- ]]; do
    case $1 in
        --dry-run) dry_run=true; shift; continue ;;
        --help | -h) echo "$usage"; exit 0 ;;
        --head | --nodes | --processes-per-node | --max-restarts | --grace | --id | --gpu) ;;
        *) fastvit_fail "unknown option '$1' (arguments of the training go after --); $usage" ;;
    esac
    [[ $# -gt 1 ]] || fastvit_fail "$1 needs a value; $usage"
    case $1 in
        --head) head=$2 ;;
        --nodes) nodes=$2 ;;
        --processes-per-node) processes=$2 ;;
        --max-restarts) restarts=$2 ;;
        --grace) grace=$2 ;;
        --id) id=$2 ;;
        --gpu) gpu=$2 ;;
    esac
    shift 2
done
[[ $# -gt 1 ]] || fastvit_fail "no recipe after --; $usage"
shift
[[ $nodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || fastvit_fail "--nodes is '$nodes': a number, or MIN:MAX"
[[ $restarts =~ ^[0-9]+$ ]] || fastvit_fail "--max-restarts is '$restarts': a number"
[[ $grace =~ ^[0-9]+$ ]] || fastvit_fail "--grace is '$grace': a number of seconds"
[[ -z $gpu ]] || $dry_run || fastvit_fail "--gpu is of --dry-run, for a host without the job's GPUs: leave it out"
[[ ${nodes%:*} -le ${nodes#*:} ]] || fastvit_fail "--nodes is '$nodes': the smaller number first"
if [[ -z $head ]]; then
    [[ $nodes == 1 ]] || fastvit_fail "--head is missing: the name or address of the node that the others meet at"
    head=127.0.0.1
fi
port=29400
[[ $nodes != 1 ]] || port=0 # any free one: nobody else has to know it
if [[ $head =~ ^([^:]+):([0-9]+)$ ]]; then
    head=${BASH_REMATCH[1]} port=${BASH_REMATCH[2]}
fi

fastvit_python
[[ -z $gpu ]] || processes=${processes:-8}
gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null) ||
    fastvit_fail "'$PYTHON' cannot import torch: activate the environment, or set PYTHON"
processes=${processes:-gpu}
[[ $processes != gpu ]] || processes=$((gpus > 0 ? gpus : 1))
[[ $processes =~ ^[1-9][0-9]*$ ]] || fastvit_fail "--processes-per-node is '$processes': a number, or 'gpu'"
if [[ -z $gpu && $gpus -gt 0 && $processes -gt $gpus ]]; then
    fastvit_fail "--processes-per-node is $processes but $(hostname) has $gpus GPUs: one process per GPU"
fi

fastvit_environment "$head" "$nodes" "$processes"
is_head=false
[[ $HEAD_ADDRESS != "$OWN_ADDRESS" ]] || is_head=true

# The c10d rendezvous in both cases: the static one hangs when it restarts. is_host and local-addr say what torchrun
# would guess from the host's name.
command=(
    "$PYTHON" "$FASTVIT_LAUNCH/torchrun/agent.py"
    --nnodes "$nodes" --nproc-per-node "$processes" --max-restarts "$restarts" --shutdown-timeout "$grace"
    --rdzv-backend c10d --rdzv-endpoint "$HEAD_ADDRESS:$port" --rdzv-id "$id"
    --rdzv-conf "is_host=$is_head,join_timeout=600,last_call_timeout=15" --local-addr "$OWN_ADDRESS"
    -m fastvit_engine train "$@" --resume auto
)
if $dry_run; then
    fastvit_check "$((${nodes%:*} * processes)):$((${nodes#*:} * processes))" "$processes" "$gpu" "$@"
    fastvit_show "${command[@]}"
    exit 0
fi
if $is_head && ! "$PYTHON" -c "import socket; socket.create_server(('', $port))" 2>/dev/null; then
    fastvit_fail "port $port of $(hostname) is taken, perhaps by another run: choose one with --head $head:PORT"
fi
exec "${command[@]}"
