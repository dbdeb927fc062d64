"""The table of a profile: how much time each kernel took, by kind, and each phase of a step."""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple, TypedDict

from fastvit_engine.observe.units import format_share

DATA, OPTIMIZER = "waiting for data", "optimizer step"  # phases of a step, as the watchdog calls them
_OWN = "our kernels"
# The first one that matches decides. Names are those of CUDA kernels, and of PyTorch's operators on a CPU.
_KINDS = (
    ("communication", re.compile(r"nccl|rccl|gloo|c10d::", re.I)),
    (_OWN, re.compile(r"^fastvit\w*::")),
    ("attention", re.compile(r"flash|fmha|attention|sdpa", re.I)),
    ("matrix products", re.compile(r"gemm|cutlass|cublas|nvjet|xmma|cijk_|matmul|_linear|::(add|baddb)?b?mm\b", re.I)),
    ("optimizer", re.compile(r"multi_tensor|adam|_fused_sgd|optimizer\.step", re.I)),
    ("copies", re.compile(r"^(memcpy|memset)|::(copy_|_to_copy|fill_|zero_)$", re.I)),
)  # fmt: skip
_MOST_SHOWN = 40  # kernels in the text; the JSON has all


class Call(NamedTuple):
    """One kernel on the GPU, or one operator on the CPU without those that it calls."""

    name: str
    phase: str
    seconds: float


class Line(TypedDict):
    """A line of a table."""

    name: str
    seconds: float
    share: float  # of the whole table, 0 to 1
    calls: int


class KernelLine(Line):
    """A line of the table by kernel."""

    kind: str


class Profile(TypedDict):
    """The content of a profile's JSON file; times are those of all its steps together."""

    steps: list[int]
    rank: int
    host: str
    device: str
    seconds: float  # wall-clock
    phases: list[Line]  # of the process's main thread
    kinds: list[Line]
    kernels: list[KernelLine]


def kind_of(name: str, phase: str, own: Collection[str] = ()) -> str:
    """Of which kind a kernel is that was called in a phase. own: names of Triton kernels of this project."""
    if name in own:
        return _OWN
    for kind, pattern in _KINDS:
        if pattern.search(name):
            return kind
    return {DATA: "data", OPTIMIZER: "optimizer"}.get(phase, "other")


def kernel_lines(calls: Iterable[Call], own: Collection[str] = ()) -> list[KernelLine]:
    """A line per kernel and kind, the longest first."""
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    counts = Counter[tuple[str, str]]()
    for call in calls:
        key = call.name, kind_of(call.name, call.phase, own)
        seconds[key] += call.seconds
        counts[key] += 1
    total = sum(seconds.values()) or 1.0
    longest = sorted(seconds.items(), key=lambda item: (-item[1], item[0]))
    return [
        {"name": name, "seconds": time, "share": time / total, "calls": counts[name, kind], "kind": kind}
        for (name, kind), time in longest
    ]


def kind_lines(kernels: Iterable[KernelLine]) -> list[Line]:
    """A line per kind, the longest first."""
    seconds: dict[str, float] = defaultdict(float)
    counts = Counter[str]()
    for line in kernels:
        seconds[line["kind"]] += line["seconds"]
        counts[line["kind"]] += line["calls"]
    return _lines(seconds, counts)


def phase_lines(phases: Iterable[tuple[str, float]]) -> list[Line]:
    """A line per phase, the longest first."""
    seconds: dict[str, float] = defaultdict(float)
    counts = Counter[str]()
    for name, time in phases:
        seconds[name] += time
        counts[name] += 1
    return _lines(seconds, counts)


def _lines(seconds: Mapping[str, float], counts: Mapping[str, int]) -> list[Line]:
    total = sum(seconds.values()) or 1.0
    return [
        {"name": name, "seconds": time, "share": time / total, "calls": counts[name]}
        for name, time in sorted(seconds.items(), key=lambda item: (-item[1], item[0]))
    ]


def as_text(profile: Profile) -> str:
    first, last = profile["steps"][0], profile["steps"][-1]
    kernels = profile["kernels"]
    left = len(kernels) - _MOST_SHOWN
    return "\n".join(
        [
            f"steps {first} to {last}, rank {profile['rank']} on {profile['host']}, {profile['device']}: "
            f"{profile['seconds']:.3f} s",
            "",
            *_text("phase", profile["phases"]),
            "",
            *_text("kind", profile["kinds"]),
            "",
            *_text("kernel", kernels[:_MOST_SHOWN], [line["kind"] for line in kernels]),
            *([f"... and {left} more, in the JSON file"] if left > 0 else []),
            "",
        ]
    )


def _text(title: str, lines: Iterable[Line], kinds: Iterable[str] = ()) -> list[str]:
    rows = [f"{'ms':>12}  {'share':>7}  {'calls':>9}  {title}"]
    named = list(kinds)
    for number, line in enumerate(lines):
        kind = f"  [{named[number]}]" if named else ""
        figures = f"{1000 * line['seconds']:12.3f}  {format_share(line['share']):>7}  {line['calls']:9,}"
        rows.append(f"{figures}  {line['name']}{kind}")
    return rows
