"""Checks what compiles code on this node: the compiler that Triton needs, and the operations of DeepSpeed."""

import os
import re
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fastvit_engine.doctor.findings import Finding, Group

_group = Group("compilers")
# Settings of the section `deepspeed` that make DeepSpeed compile an operation; all others need none here.
_COMPILED_FOR = {
    "zero_quantized_weights": "quantizer",
    "zero_quantized_nontrainable_weights": "quantizer",
    "zero_quantized_gradients": "quantizer",
}
_ABANDONED = 600.0  # seconds that a build may take


def check_compilers(deepspeed: Mapping[str, Any]) -> Iterator[Finding]:
    """deepspeed: the section of the configuration."""
    yield _check_compiler()
    yield from _check_nvcc()
    yield from _check_locks()
    yield from _check_operations(deepspeed)


def _check_compiler() -> Finding:
    """Triton compiles a small C file for every kernel, and so needs Python's headers."""
    named = os.environ.get("CC")
    compiler = shutil.which(named) if named else next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if compiler is None:
        found = f"CC is {named!r}, which is not there" if named else "there is none"
        advice = "unset CC, or correct it" if named else "install gcc (Debian: apt-get install gcc)"
    elif not header.is_file():
        found, advice = f"{compiler}, and no {header}", "install Python's headers (Debian: apt-get install python3-dev)"
    else:
        return _group.ok("C compiler", f"{compiler}, with Python's headers")
    if torch.cuda.is_available():
        return _group.problem("C compiler", f"{found}: Triton's kernels cannot be compiled", advice)
    return _group.note("C compiler", f"{found}; Triton needs it on a GPU", advice)


def _check_nvcc() -> Iterator[Finding]:
    """The CUDA toolkit, which only operations of DeepSpeed are compiled with."""
    if torch.version.cuda is None:
        return
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    advice = f"nothing, unless you compile operations of DeepSpeed: then set CUDA_HOME to CUDA {torch.version.cuda}"
    if path is None:
        where = f"in CUDA_HOME={home}" if home else "on the PATH, and CUDA_HOME is not set"
        yield _group.note("nvcc", f"there is none {where}", advice)
        return
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None:
        yield _group.note("nvcc", f"{path} does not say its version", advice)
    elif release[1] != torch.version.cuda.split(".")[0]:
        found = f"{path} is of CUDA {release[1]}.{release[2]}, and torch was built for {torch.version.cuda}"
        yield _group.note("nvcc", found, advice)
    else:
        yield _group.ok("nvcc", f"{path}, of CUDA {release[1]}.{release[2]}")


def _check_locks() -> Iterator[Finding]:
    """Locks of builds that were killed: whoever builds the same next waits for them in silence, for ever."""
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    old = [lock for lock in folder.glob("**/lock") if time.time() - lock.stat().st_mtime > _ABANDONED]
    if old:
        yield _group.warning(
            "locks",
            f"a build that has ended left {old[0]}" + (f" and {len(old) - 1} more" if len(old) > 1 else ""),
            f"if nothing is being compiled, remove it: rm '{old[0]}'; the next build would wait for it for ever",
        )


def _check_operations(settings: Mapping[str, Any]) -> Iterator[Finding]:
    import deepspeed
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    names = ALL_OPS.keys() - {"deepspeed_not_implemented"}  # a placeholder
    can = sorted(name for name in names if _is_compatible(ALL_OPS[name]))
    cannot = sorted(names - set(can))
    zero = settings.get("zero_optimization", {})
    wanted = {operation: key for key, operation in _COMPILED_FOR.items() if zero.get(key)}
    missing = [operation for operation in wanted if operation not in can]
    for operation in missing:
        yield _group.problem(
            f"DeepSpeed's {operation}",
            f"deepspeed.zero_optimization.{wanted[operation]} needs it, and it cannot be compiled here",
            "run `ds_report`, which says what it lacks, or leave the setting out",
        )
    ninja = shutil.which("ninja")
    if wanted and ninja is None:
        yield _group.problem("ninja", "it is not on the PATH, and DeepSpeed compiles with it", "pip install ninja")
    needs = ", ".join(wanted) if wanted else "none of them"
    found = f"can be compiled: {', '.join(can) or 'none'}; cannot: {', '.join(cannot) or 'none'}"
    found += f"; these settings need {needs}"
    yield _group.ok("DeepSpeed's operations", f"{found} (DeepSpeed {deepspeed.__version__})")
    if "async_io" in cannot:
        yield _group.ok("async_io", "cannot be compiled (it needs libaio's headers); the engine never uses it")


def _is_compatible(builder: Any) -> bool:
    try:
        return bool(builder.is_compatible(verbose=False))
    except Exception:  # a builder that trips over what it does not find cannot build
        return False
