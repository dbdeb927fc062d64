# shellcheck shell=bash
# Sourced by DeepSpeed's launcher in the login shell of every host: host.sh PYTHON HEAD NODES PROCESSES [VENV_SCRIPT]
# The network interface, the number of cores and the caches are each host's own.

if [[ -n ${5:-} ]]; then
    # shellcheck disable=SC1090  # the user's
    source "$5"
fi
PYTHON=$1
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
fastvit_environment "$2" "$3" "$4"
