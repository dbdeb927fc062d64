#!/usr/bin/env bash
# What a pod runs: its part of a torchrun job. The arguments are those of ../torchrun/run.sh, but for --head, which
# the operator's variables give: MASTER_ADDR and RANK (PyTorchJob), or PET_MASTER_ADDR and PET_NODE_RANK (TrainJob).
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"

rank=${PET_NODE_RANK:-${RANK:-}} master=${PET_MASTER_ADDR:-${MASTER_ADDR:-}}
[[ -n $rank && -n $master ]] || fastvit_fail "neither RANK and MASTER_ADDR nor PET_NODE_RANK and PET_MASTER_ADDR are set"
if [[ $rank == 0 ]]; then # to the first pod, the operator may say 'localhost'
    master=${POD_IP:?the manifest gives it}
fi
unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT # they number pods; torchrun numbers processes

bash "$FASTVIT_LAUNCH/torchrun/run.sh" --head "$master" "$@" &
running=$!
trap 'fastvit_trapped=true; kill -TERM $running 2>/dev/null || true' TERM INT
code=0
fastvit_wait "$running" || code=$?

# To Kubeflow, exit codes from 128 on ask for a restart, and smaller ones are final.
case $code in
    75 | 76) exit 143 ;;
    *) exit "$code" ;;
esac
