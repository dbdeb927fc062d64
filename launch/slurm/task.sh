#!/usr/bin/env bash
# One task of SLURM, which is one rank: task.sh HEAD NODES TASKS_PER_NODE BAD_INPUT_FILE COMMAND...
# It chooses its node's environment, and tells the job script what srun cannot: srun's exit code is the highest one, and
# one rank's "bad input" (2) would be lost behind the "start me again" (75) of those that then missed it.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"

fastvit_environment "$1" "$2" "$3"
bad_input=$4
shift 4
trap : USR1 TERM # SLURM signals every process of a task: the training answers, this shell waits for it
code=0
"$@" || code=$?
[[ $code -ne 2 ]] || touch "$bad_input"
exit "$code"
