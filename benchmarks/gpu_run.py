"""Checks, measures and tunes this engine on a GPU, in six calls of some minutes each.

    python -m benchmarks.gpu_run --call 1 --out results1
    python -m benchmarks.gpu_run --call 2 --out results2 --previous results1
    python -m benchmarks.gpu_run --call 3 --out results3 --previous results2
    python -m benchmarks.gpu_run --call 4 --out results4 --previous results3
    python -m benchmarks.gpu_run --call 5 --out results5 --previous results4
    python -m benchmarks.gpu_run --call 6 --out results6 --previous results5

call 1  what the machine can do at best; is everything right, with Triton's own assembler and with a current one;
        attention alone, against flash and cuDNN
call 2  training steps of ViT-H/14 at batch 256 and 64: this engine and timm, with a table of each one's kernels
call 3  launch parameters of attention and layer normalisation, whether QuACK multiplies, then training with all that
call 4  all operations against their peers, and the tests that need a GPU
call 5  FP8: is it right, one layer against other libraries, steps of ViT-H/14 and their losses beside those in bf16
call 6  the tests of training that need a GPU; steps of ViT-H/14 under each memory policy, and the memory that each
        needs beside what is predicted; steps of few images in CUDA graphs and compiled

A call takes over what the one before it left: which assembler gives right results, the table of launch parameters, and
all files. Given a folder of the same call as --previous, it repeats only the parts that did not succeed. The most
valuable parts come first; a part that fails or runs out of time keeps what it has and does not stop the others, and one
for which no time is left is left out with a line that says so. The folder has three files, rewritten after every part:
`summary.json` (versions, what ran, how it ended), `report.md` (the tables, and the ends of the logs) and
`results.tar.gz` (everything so far: raw figures, pictures, logs).

Needs torch, triton and numpy; every peer that is installed takes part. `--wheels` takes a folder of wheels for a
machine without a network, as `make wheels` fills it: among them the current assembler.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from benchmarks.gpu_calls import PYTHON, Command, Part, Place, conclusions, parts
from fastvit_engine.files import atomic_write
from fastvit_engine.unpack import unpack

ROOT = Path(__file__).parent.parent
MINUTES = 6.5  # for a call
PATIENCE = 15  # seconds between Ctrl-C and the end: for the report of what was measured until then
ARCHIVE = "results.tar.gz"

NEEDED = ("torch", "triton", "numpy")
# What is not done without a package.
WANTED = {
    "pydantic": "no training",
    "yaml": "no training (PyYAML)",
    "PIL": "no training (pillow)",
    "cv2": "no training (opencv-python-headless)",
    "simplejpeg": "no training",
    "webdataset": "no training",
    "braceexpand": "no training",
    "deepspeed": "no ZeRO, no `fastvit train`, no FusedAdam of DeepSpeed",
    "tensorboard": "no `fastvit train`",
    "pytest": "no tests",
    "hypothesis": "most kernel tests do not load",
    "xdist": "kernel tests one after the other (pytest-xdist)",
    "timm": "no timm among the peers",
    "transformers": "no transformers among the peers",
    "matplotlib": "no pictures",
    "flash_attn": "no flash-attn 2",
    "flash_attn_interface": "no flash-attn 3",
    "quack": "no QuACK",
    "liger_kernel": "no Liger-Kernel",
    "transformer_engine": "no TransformerEngine",
    "xformers": "no xformers",
    "torchao": "no float8",
    "apex": "no apex (NVIDIA's, built from source)",
    "rich": "figures of operations in a Markdown table",
}


@dataclass(frozen=True)
class Outcome:
    """How one program of a part ended."""

    call: int
    part: str
    name: str  # of the program and its log
    command: list[str]
    environment: dict[str, str]
    exit_code: int | None  # None: it ran out of time, or was not begun
    seconds: float
    note: str = ""  # why it was not begun


# ---- running a part


def run(part: Part, call: int, seconds: float, folder: Path) -> list[Outcome]:
    """Runs the programs of a part at the same time, each with its output in `callN-NAME.log`."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda command: run_one(part, call, command, seconds, folder), part.commands(seconds)))


def run_one(part: Part, call: int, command: Command, seconds: float, folder: Path) -> Outcome:
    """As often as the program asks for within its limit."""
    start = time.monotonic()
    with (folder / f"call{call}-{command.name}.log").open("w") as log:
        code = attempt(command, log, seconds)
        while code is not None and code == part.again_on:
            left = seconds - (time.monotonic() - start)
            again = next(other for other in part.commands(left) if other.name == command.name)
            code = attempt(again, log, left)
    taken = round(time.monotonic() - start, 1)
    return Outcome(call, part.name, command.name, command.words, command.environment, code, taken)


def attempt(command: Command, log: TextIO, seconds: float) -> int | None:
    """The exit code, or None: after its time a program is stopped as by Ctrl-C, on which it writes what it has."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"} | command.environment
    try:
        process = subprocess.Popen(
            command.words, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    except OSError as error:
        log.write(f"{error}\n")
        return 127
    try:
        return process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        return None
    finally:
        with suppress(ProcessLookupError):  # whatever it started and left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# ---- what there is


def install(wheels: Path, site: Path) -> list[str]:
    """Installs into `site` what this machine lacks of the wheels, and makes it importable here and in the steps.

    Returns those that cannot be installed. What is there already stays: other packages may need just that version.
    """
    pip = [*PYTHON, "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(site)]
    lacking = [str(path) for path in sorted(wheels.glob("*.whl")) if version(path.name.partition("-")[0]) is None]
    failed = []
    if lacking and subprocess.run([*pip, *lacking]).returncode != 0:  # none of them is installed, if one does not fit
        failed = [Path(wheel).name for wheel in lacking if subprocess.run([*pip, wheel]).returncode != 0]
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    return failed


def dependencies() -> tuple[list[str], list[str]]:
    """(missing packages without which nothing runs, other missing packages and what their absence costs)."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return missing, [f"{name}: {cost}" for name, cost in WANTED.items() if importlib.util.find_spec(name) is None]


def versions() -> dict[str, str | None]:
    packages = ("torch", "triton", "numpy", "deepspeed", "timm", "transformers", "pytest")
    return {
        "python": platform.python_version(),
        "machine": platform.platform(),
        "gpu": gpu(),
        **{package: version(package) for package in packages},
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu() -> str | None:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def assembler() -> Path | None:
    """The ptxas of the package nvidia-cuda-nvcc, if it is installed."""
    for folder in map(Path, sys.path):
        for path in sorted(folder.glob("nvidia/*/bin/ptxas")):
            if os.access(path, os.X_OK):
                return path
    return None


# ---- what it takes over, and what it leaves


def take_over(previous: Path, folder: Path) -> list[Outcome]:
    """Unpacks the results of earlier calls, and returns how their parts ended. Raises ValueError if there are none."""
    archive, summary = previous / ARCHIVE, previous / "summary.json"
    if not (archive.is_file() and summary.is_file()):
        raise ValueError(f"--previous {previous}: there is no {ARCHIVE} with its summary.json, as a call leaves them")
    with tarfile.open(archive) as packed:
        unpack(packed, folder)
    return [Outcome(**outcome) for outcome in json.loads(summary.read_text())["parts"]]


def done(outcomes: Sequence[Outcome], call: int, part: Part) -> bool:
    """Whether every program of this part has succeeded before."""
    codes = [outcome.exit_code for outcome in outcomes if (outcome.call, outcome.part) == (call, part.name)]
    return bool(codes) and all(code == 0 for code in codes)


def pack(out: Path, place: Place, found: dict[str, object], outcomes: Sequence[Outcome]) -> None:
    """Writes the three files from the results so far."""
    folder = place.folder
    atomic_write(out / "summary.json", json.dumps(found | {"parts": [asdict(o) for o in outcomes]}, indent=1) + "\n")
    reports = sorted(folder.rglob("*.md"), key=lambda path: path.stat().st_mtime)
    text = [parts_table(outcomes), *conclusions(place), *(path.read_text() for path in reports), logs(outcomes, folder)]
    atomic_write(out / "report.md", "\n\n".join(text))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(folder, arcname=".")
    atomic_write(out / ARCHIVE, packed.getvalue())


def parts_table(outcomes: Sequence[Outcome]) -> str:
    lines = ["# Parts", "", "| call | part | exit code | s |", "|---:|---|---|---:|"]
    for outcome in outcomes:
        code = outcome.note or ("not done" if outcome.exit_code is None else outcome.exit_code)
        lines.append(f"| {outcome.call} | {outcome.name} | {code} | {outcome.seconds:.0f} |")
    return "\n".join(lines)


def logs(outcomes: Sequence[Outcome], folder: Path, lines: int = 30) -> str:
    """How the output of every program ends."""
    parts = ["# Logs"]
    for outcome in outcomes:
        path = folder / f"call{outcome.call}-{outcome.name}.log"
        if path.exists():
            written = path.read_text(errors="replace").splitlines()
            parts += ["", f"## {path.stem}", "", "```", *(line[:300] for line in written[-lines:]), "```"]
    return "\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_run",
        description=(__doc__ or "").splitlines()[0],
        epilog="example: python -m benchmarks.gpu_run --call 1 --out results1 --wheels wheels",
    )
    parser.add_argument("--call", type=int, required=True, choices=(1, 2, 3, 4, 5, 6), help="which of the six")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--previous", type=Path, metavar="DIR", help="the --out of the call before, or of this one")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for this call (default {MINUTES})")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels of packages to install if they are missing")
    parser.add_argument("--dry-run", action="store_true", help="the same programs on a CPU, measuring next to nothing")
    parsed = parser.parse_args(arguments)
    if parsed.wheels and not any(parsed.wheels.glob("*.whl")):
        parser.error(f"there are no wheels in {parsed.wheels}")
    out = parsed.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder, site = Path(scratch, "results"), Path(scratch, "site")
        folder.mkdir()
        try:
            outcomes = take_over(parsed.previous, folder) if parsed.previous else []
        except (ValueError, tarfile.TarError) as error:
            parser.error(str(error))
        unfit = install(parsed.wheels, site) if parsed.wheels else []
        if unfit:
            print(f"wheels that cannot be installed here: {', '.join(unfit)}")
        missing, poorer = dependencies()
        if missing:
            print(f"not installed, and nothing runs without: {', '.join(missing)}")
            return 2
        print("\n".join(["not installed, and therefore:", *(f"  {line}" for line in poorer)]), flush=True)
        place = Place(folder, parsed.dry_run, assembler())
        found: dict[str, object] = {"versions": versions(), "not_installed": poorer, "unfit_wheels": unfit}
        found["current_assembler"] = place.ptxas is not None
        deadline = start + 60 * parsed.minutes
        own = run_call(parsed.call, place, outcomes, deadline, lambda those: pack(out, place, found, those))
        print("\n".join([logs(own, folder), parts_table(own), "", *conclusions(place)]))
    return int(any(outcome.exit_code != 0 for outcome in own))


def run_call(
    call: int, place: Place, before: Sequence[Outcome], deadline: float, keep: Callable[[Sequence[Outcome]], None]
) -> list[Outcome]:
    """The outcomes of this call's parts, handed to `keep` with those before after every part."""
    if call > 1:
        print("\n".join(filter(None, [place.assembler()[1], place.fallback()[1]])), flush=True)
    elif place.ptxas is None:
        print("There is no current ptxas (nvidia-cuda-nvcc): kernels are checked with Triton's own alone.", flush=True)
    others = [outcome for outcome in before if outcome.call != call]
    own: list[Outcome] = []
    for part in parts(call, place):
        left = deadline - time.monotonic() - PATIENCE
        earlier = [outcome for outcome in before if (outcome.call, outcome.part) == (call, part.name)]
        if done(before, call, part):
            print(f"{part.name}: done in an earlier call", flush=True)
            own += earlier
        elif left < part.least:
            note = f"no time was left for it: it needs {part.least:.0f} s, and there were {max(left, 0):.0f}"
            print(f"{part.name}: {note}", flush=True)
            own.append(Outcome(call, part.name, part.name, [], {}, None, 0, note))
        else:
            seconds = min(left, part.most)
            print(f"{part.name}, {seconds:.0f} s at most", flush=True)
            ended = run(part, call, seconds, place.folder)
            for outcome in ended:
                print(f"{outcome.name}: exit code {outcome.exit_code} after {outcome.seconds} s", flush=True)
            own += ended
        keep([*others, *own])
    return own


if __name__ == "__main__":
    sys.exit(main())
