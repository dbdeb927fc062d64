"""Finds the fastest launch parameters on this GPU and writes them to a file.

    python -m fastvit_kernels.tuning --out H200.json
    python -m fastvit_kernels.tuning --dry-run --arch sm_90 --ops layer_norm --shapes H/14

Cases come in order of importance and the file is written after each: if stopped and run again, it continues.
"""

import argparse
import json
import os
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import triton

from fastvit_kernels import dispatch
from fastvit_kernels.table import NOTES, TOOL, Provenance, Table, load, save
from fastvit_kernels.tuning import search
from fastvit_kernels.tuning.codegen import TARGETS
from fastvit_kernels.tuning.gpu import Compiler, LocalGpu
from fastvit_kernels.tuning.search import MODELS, OPS, GpuLost, Trial, Unmeasured, describe

GPU_LOST = 3  # exit code: run again to continue with the next case


def main() -> int:
    arguments = parse()
    if arguments.untuned:
        return write_untuned(arguments.untuned, arguments.out)
    if arguments.dry_run:
        return dry_run(arguments)
    if not torch.cuda.is_available():
        return refuse("tuning measures on a GPU, and PyTorch sees none here; --dry-run needs none")
    machine = LocalGpu(arguments.ops, arguments.shapes, arguments.jobs, arguments.cases)
    try:
        return measure(arguments, machine)
    finally:
        machine.compiler.close()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastvit_kernels.tuning",
        description="Compile, check and measure launch parameters on this GPU, and write the fastest to a file.",
        epilog="example: python -m fastvit_kernels.tuning --shapes H/14 --minutes 8 --out H200.json",
    )
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=OPS, help="operations, default all")
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["H/14", "L/16", "B/16"],
        choices=MODELS,
        metavar="MODEL",
        help=f"models, most important first: {', '.join(MODELS)}; default H/14 L/16 B/16",
    )
    parser.add_argument(
        "--cases", nargs="+", default=[], metavar="WORD", help="only cases with one of these words in their names"
    )
    parser.add_argument("--out", type=Path, help="file to write or continue (default: the GPU's name, in this folder)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop before this long, default when done")
    parser.add_argument("--quick", action="store_true", help=f"{search.QUICK_ROUNDS} rounds, not {search.ROUNDS}")
    parser.add_argument("--json", action="store_true", help="print what became of each case as JSON, not as a table")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compiling processes (default: one per core)")
    parser.add_argument("--dry-run", action="store_true", help="compile and list the candidates for --arch; no GPU")
    parser.add_argument("--arch", choices=TARGETS, default="sm_90", help="for --dry-run, default sm_90")
    parser.add_argument("--untuned", metavar="GPU", help="write the file of a GPU without measurements")
    return parser.parse_args()


def measure(arguments: argparse.Namespace, machine: LocalGpu) -> int:
    start, gpu = time.monotonic(), machine.gpu.name
    path = arguments.out or Path(f"{gpu}.json")
    table = Table(provenance(gpu, measured=True, quick=arguments.quick))
    if path.exists():
        try:
            found = load(path)
        except ValueError as error:
            return refuse(str(error))
        if found.provenance.measured:
            if differing := differences(found.provenance, table.provenance):
                return refuse(f"{path} has {differing}: choose another --out, or remove it")
            table = found
    cases = search.cases(arguments.ops, arguments.shapes, machine.gpu, arguments.cases)
    if arguments.cases and not cases:
        return refuse(f"no case has a name with {' or '.join(arguments.cases)}; --dry-run lists the names")
    trials: list[Trial | Unmeasured] = []

    def report(outcome: Trial | Unmeasured, left: int, seconds: float) -> None:
        trials.append(outcome)
        if not arguments.json:
            print(line(outcome), flush=True)
        passed = time.monotonic() - start
        print(f"{passed:.0f} s, {left} cases left, about {seconds:.0f} s", file=sys.stderr, flush=True)

    if not arguments.json:
        print(f"{gpu}: {len(cases)} cases, {len(cases) - unknown(table, cases)} known already\n{HEADER}", flush=True)
    rounds = search.QUICK_ROUNDS if arguments.quick else search.ROUNDS
    try:
        with dispatch.using("auto"):  # the table decides only there
            table = search.tune(
                cases, machine, table, path, rounds=rounds, seconds=60 * arguments.minutes, report=report
            )
    except GpuLost as error:
        print(f"{error}\nThis process lost the GPU. Run the same command again to continue.", file=sys.stderr)
        return GPU_LOST
    if arguments.json:
        print(json.dumps([asdict(trial) for trial in trials], indent=1))
    for case, reason in table.failed.items():
        print(f"passed over, as it broke the GPU: {case} ({reason})", file=sys.stderr)
    left = unknown(table, cases)
    what = f"{left} cases are left: run the same command again" if left else "all cases are measured"
    print(f"{path}: {what}. Use it with FASTVIT_TUNING={shlex.quote(str(path.resolve()))}", file=sys.stderr)
    return 0


def unknown(table: Table, cases: list[search.Case]) -> int:
    return sum(not search.known(table, case) for case in cases)


def provenance(gpu: str, *, measured: bool, quick: bool = False) -> Provenance:
    date = time.strftime("%Y-%m-%d", time.gmtime())
    return Provenance(gpu, measured, NOTES[measured], date, triton.__version__, torch.__version__, TOOL, quick)


def differences(a: Provenance, b: Provenance) -> str:
    """What sets the measurements of two files apart, in words."""
    pairs = [(name, ours, getattr(b, name)) for name, ours in asdict(a).items() if name not in ("date", "note")]
    return ", ".join(f"{name} {ours}, not {theirs}" for name, ours, theirs in pairs if ours != theirs)


HEADER = f"{'case':<44}{'default ms':>12}{'best ms':>12}{'ratio':>8}{'noise':>8}  chosen"


def line(outcome: Trial | Unmeasured) -> str:
    if isinstance(outcome, Unmeasured):
        return f"{outcome.case:<44}not measured: {outcome.reason}"
    figures = (
        f"{outcome.default_ms:>12.4f}{outcome.ms:>12.4f}{outcome.ms / outcome.default_ms:>8.3f}{outcome.noise:>8.3f}"
    )
    discarded = [f"\n    left out {option}: {reason}" for option, reason in outcome.discarded.items()]
    return f"{outcome.case:<44}{figures}  {outcome.chosen}" + "".join(discarded)


def dry_run(arguments: argparse.Namespace) -> int:
    """Lists every option with what the compiler makes of it."""
    target = TARGETS[arguments.arch]
    rows: list[dict[str, object]] = []
    compiler = Compiler(arguments.ops, arguments.shapes, target, arguments.jobs, arguments.cases)
    try:
        for case in search.cases(arguments.ops, arguments.shapes, target.gpu, arguments.cases):
            for option in case.options(target.gpu):
                compiled, obstacle = compiler.compiled(case, option), compiler.obstacle(case, option)
                kernels = [] if isinstance(compiled, str) else compiled
                rows.append({"case": case.name, "option": describe(option), "obstacle": obstacle})
                rows[-1] |= {k.kernel: {"registers": k.registers, "shared_bytes": k.shared_bytes} for k in kernels}
                if not arguments.json:
                    said = "".join(f"{k.registers} registers, {k.shared_bytes} bytes shared" for k in kernels)
                    print(
                        f"{case.name:<44}{describe(option):<75}{said}{f'; {obstacle}' if obstacle else ''}", flush=True
                    )
    finally:
        compiler.close()
    if arguments.json:
        print(json.dumps(rows, indent=1))
    return 0


def write_untuned(gpu: str, out: Path | None) -> int:
    """An empty table: defaults are in the code, and only there."""
    path = out or Path(f"{gpu}.json")
    save(Table(provenance(gpu, measured=False)), path)
    print(f"{path}: {NOTES[False]}")
    return 0


def refuse(sentence: str) -> int:
    print(f"fastvit_kernels.tuning: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
