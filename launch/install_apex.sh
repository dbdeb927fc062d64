#!/usr/bin/env bash
# Installs NVIDIA's apex with its C++ and CUDA extensions, from source at a fixed tag. The engine does not need it; some
# peers of the benchmarks do.
set -euo pipefail

TAG=25.09
REPOSITORY=https://github.com/NVIDIA/apex
PYTHON=${PYTHON:-python}

fail() {
    echo "install_apex: error: $1" >&2
    exit 2
}

# The package index has an unrelated package of the same name, a toolkit for Pyramid web sites.
summary=$("$PYTHON" -m pip show apex 2>/dev/null | sed -n 's/^Summary: //p' || true)
if [[ $summary == *Pyramid* ]]; then
    fail "the installed 'apex' is not NVIDIA's, but an unrelated package of that name ($summary): pip uninstall apex"
fi
if "$PYTHON" -c 'import amp_C, apex' 2>/dev/null; then
    echo "NVIDIA's apex with CUDA extensions is already here"
    exit 0
fi

command -v git >/dev/null || fail "git is missing"
cuda=$("$PYTHON" -c 'import torch; print(torch.version.cuda or "")' 2>/dev/null) || fail "$PYTHON has no PyTorch: install it first"
[[ -n $cuda ]] || fail "this PyTorch is built without CUDA: apex's extensions need it"
nvcc=${CUDA_HOME:+$CUDA_HOME/bin/}nvcc
command -v "$nvcc" >/dev/null || fail "nvcc is missing: install the CUDA toolkit $cuda, or set CUDA_HOME"
toolkit=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
[[ $toolkit == "$cuda" ]] || fail "nvcc is of CUDA $toolkit and PyTorch of CUDA $cuda: apex builds only if they agree"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git clone --quiet --depth 1 --branch "$TAG" --recurse-submodules --shallow-submodules "$REPOSITORY" "$folder/apex"
APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_PARALLEL_BUILD=${APEX_PARALLEL_BUILD:-8} \
    "$PYTHON" -m pip install --verbose --no-build-isolation --no-cache-dir "$folder/apex"
"$PYTHON" -c 'import amp_C, apex; print("NVIDIA apex", "'"$TAG"'", "with CUDA extensions")'
