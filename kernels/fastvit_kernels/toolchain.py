"""Which assembler (ptxas) turns Triton's kernels into machine code for a GPU, and its reported faults.

Triton ships two: one for GPUs before Blackwell, one from sm_100 on. `TRITON_PTXAS_PATH` and
`TRITON_PTXAS_BLACKWELL_PATH` name others, such as that of the package `nvidia-cuda-nvcc`. Kernels that each has
compiled are cached separately. If a result is wrong with one and right with the other, the assembler is at fault.
"""

import importlib.util
import os
import re
import subprocess
from functools import lru_cache
from typing import NamedTuple

if importlib.util.find_spec("triton") is not None:
    import triton
    from triton import knobs

Version = tuple[int, ...]


class Assembler(NamedTuple):
    """A ptxas that runs."""

    path: str
    version: Version  # (12, 8, 93)
    origin: str  # "shipped with Triton 3.7.1", or the variable that names it


class Fault(NamedTuple):
    """A defect that users of other kernels have reported. Nothing says that these kernels meet it."""

    what: str
    source: str
    arches: tuple[str, ...]  # beginnings of names
    triton: tuple[Version, Version] = ((0,), (99,))  # from, and before
    ptxas: tuple[Version, Version] = ((0,), (99,))

    def applies(self, arch: str, triton: Version, ptxas: Version) -> bool:
        return (
            arch.startswith(self.arches)
            and self.triton[0] <= triton < self.triton[1]
            and self.ptxas[0] <= ptxas < self.ptxas[1]
        )


FAULTS = (
    Fault(
        "wrong numbers and invalid shared writes in backward kernels; ptxas 13.1.80 is right",
        "fla-org/flash-linear-attention#1262",
        ("sm_90",),
        ptxas=((12, 8), (13, 1)),
    ),
    Fault(
        "invalid shared reads in kernels of 4 warps with several products",
        "triton-lang/triton#11366",
        ("sm_90",),
        triton=((3, 7, 1), (3, 7, 2)),
    ),
    Fault(
        "wrong results of two products that add to one accumulator in one step of a loop; attention keeps them apart",
        "triton-lang/triton#10821",
        ("sm_100", "sm_103"),
        triton=((0,), (3, 9)),
    ),
)


def assembler(arch: str) -> Assembler:
    """The ptxas that Triton uses for "sm_90" and the like. Raises RuntimeError if there is none that runs."""
    blackwell = int(arch.removeprefix("sm_").rstrip("af")) >= 100
    variable = "TRITON_PTXAS_BLACKWELL_PATH" if blackwell else "TRITON_PTXAS_PATH"
    path = (knobs.nvidia.ptxas_blackwell if blackwell else knobs.nvidia.ptxas).path
    wanted = os.environ.get(variable)
    origin = f"shipped with Triton {triton.__version__}"
    if wanted:
        origin = variable if path == wanted else f"{origin}, as {variable}={wanted} cannot be run"
    return Assembler(path, version_of(path), origin)


@lru_cache
def version_of(path: str) -> Version:
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"{path} --version does not run: {error}") from error
    match = re.search(r"\bV(\d+(?:\.\d+)+)", said)
    if match is None:
        raise RuntimeError(f"{path} --version names no version: {said.strip()!r}")
    return tuple(map(int, match[1].split(".")))


def faults(arch: str, triton_version: str, ptxas: Version) -> list[Fault]:
    """The known faults of this Triton ("3.7.1") and ptxas for this GPU."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", triton_version)[:3])
    return [fault for fault in FAULTS if fault.applies(arch, numbers, ptxas)]


def describe(arch: str) -> str:
    """Lines for a person: the assembler for this GPU, and each of its known faults."""
    if not arch.startswith("sm_"):
        return f"assembler: Triton's own for {arch}"
    used = assembler(arch)
    number = ".".join(map(str, used.version))
    lines = [f"assembler: ptxas {number} for {arch} ({used.origin}: {used.path})"]
    for fault in faults(arch, triton.__version__, used.version):
        lines.append(f"  reported with it: {fault.what} ({fault.source})")
    return "\n".join(lines)
