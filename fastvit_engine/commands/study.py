"""`fastvit study`: trains runs that differ in some settings, and shows what they reached as a table and a picture."""

import argparse
import json
import os
import shlex
import sys
from typing import TYPE_CHECKING

from fastvit_engine.commands.loading import loading_pytorch
from fastvit_engine.commands.model import check_output_folder
from fastvit_engine.commands.parser import local_path, positive, setting
from fastvit_engine.errors import UserError
from fastvit_engine.recipe_files import study_paths
from fastvit_engine.shown import say

if TYPE_CHECKING:
    from fastvit_engine.study.definition import Study
    from fastvit_engine.study.planning import PlannedRun
    from fastvit_engine.study.records import StudyFolder

_SCRIPT = "launch/slurm/study.sbatch"


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", purpose: str) -> None:
    parser = commands.add_parser(
        "study",
        help=purpose,
        description="Trains the runs of a study one after the other, each as `fastvit train` does, and writes what\n"
        "they reached: DIR/study.json, DIR/table.md, and a picture as .png and .svg. It says first how many runs\n"
        "there are and how long they take. The same command again continues: finished runs are kept, broken ones\n"
        "resumed, and failed ones tried again. The exit code is 1 if a run failed.",
        epilog=f"studies: {', '.join(study_paths())}\n\n"
        "examples:\n  fastvit study pooling --out studies/pooling --set 'data.train=cifar10/train-*.tar' \\\n"
        "      --set 'data.eval=cifar10/test-*.tar'\n"
        "  fastvit study mine.yaml --out studies/mine --seeds 5 --dry-run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", metavar="STUDY", help="the name of a study, see below, or a YAML file")
    parser.add_argument("--out", metavar="DIR", type=local_path, required=True, help="folder for runs and results")
    parser.add_argument("--set", metavar="KEY=VALUE", type=setting, action="append", default=[],
                        help="a setting of every run: --set data.train=SHARDS")  # fmt: skip
    parser.add_argument("--seeds", metavar="N", type=positive, help="repetitions of every run (default: the study's)")
    parser.add_argument("--only", metavar="K", type=int, nargs="+",
                        help="train these runs only, by their numbers, as --dry-run lists them")  # fmt: skip
    parser.add_argument("--cpu-processes", metavar="N", type=positive, default=1,
                        help="processes of each run if there is no GPU (default: 1)")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="list the runs and what they take, and write nothing")
    parser.add_argument("--slurm", action="store_true",
                        help="print the command that submits the runs to SLURM, as an array of a job each")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print study.json at the end, and all else to stderr")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from fastvit_engine.observe.optional import require
    from fastvit_engine.study.definition import find_study, read_study

    path = find_study(args.study)
    study = read_study(path)
    check_output_folder(args.out)
    require("fastvit study", "figures", "matplotlib")

    with loading_pytorch():
        from fastvit_engine.distributed.environment import launched_by_cluster
        from fastvit_engine.distributed.launch import processes_here
        from fastvit_engine.study.planning import plan_study
        from fastvit_engine.study.records import StudyFolder

    if launched_by_cluster():
        raise UserError(
            "fastvit study starts the processes of its runs itself, and a launcher has started several of it: run it "
            "once, or submit what --slurm prints"
        )
    processes = processes_here(args.cpu_processes)
    runs = plan_study(study, path, args.set, seeds=args.seeds, world_size=processes)
    folder = StudyFolder(args.out)
    chosen = _chosen(runs, args.only)
    if args.slurm:
        say(_slurm_command(args, chosen, folder))
        return 0
    return _execute(args, study, runs, chosen, folder, processes)


def _chosen(runs: "list[PlannedRun]", only: list[int] | None) -> "list[PlannedRun]":
    if only is None:
        return runs
    if wrong := [number for number in only if not 0 <= number < len(runs)]:
        raise UserError(f"--only {wrong[0]}: the study has the runs 0 to {len(runs) - 1}")
    return [runs[number] for number in sorted(set(only))]


def _execute(
    args: argparse.Namespace,
    study: "Study",
    runs: "list[PlannedRun]",
    chosen: "list[PlannedRun]",
    folder: "StudyFolder",
    processes: int,
) -> int:
    from fastvit_engine.observe.units import counted
    from fastvit_engine.study.execution import Executor
    from fastvit_engine.study.figure import draw
    from fastvit_engine.study.pace import Pace
    from fastvit_engine.study.records import BEGUN, FAILED, FINISHED
    from fastvit_engine.study.results import Results

    def speak(text: str) -> None:
        say(text, file=sys.stderr if args.json else sys.stdout)

    records = folder.records(runs)
    pace = Pace(processes)
    for run in runs:
        if (record := records.get(run.name)) is not None and record["state"] == FINISHED:
            pace.measure(run.computed_flops, record["train_seconds"], record["seconds"])
    states = {run.name: records[run.name]["state"] for run in chosen if run.name in records}
    left = [run for run in chosen if states.get(run.name) != FINISHED]
    known = ((FINISHED, "finished"), (BEGUN, "to resume"), (FAILED, "to try again"))
    counts = [(list(states.values()).count(state), what) for state, what in known]
    kept = ", ".join(f"{count} {what}" for count, what in counts if count)
    what = f"{study.name}: {counted(len(chosen), 'run')}{f' ({kept})' if kept else ''}"
    if left:
        steps = sum(run.steps for run in left)
        what += f"; training {len(left)}, {counted(steps, 'step')} in all, {pace.describe(left)}"
    speak(what)
    if args.dry_run:
        for run in chosen:
            state = f" ({states[run.name]})" if run.name in states else ""
            speak(f"  {run.number:>3}  {run.steps:>9,} steps  {run.title}{state}")
        return 0

    def settle() -> None:
        """Writes the results; again if another process of the study has measured a run meanwhile."""
        before = None
        while (now := folder.records(runs)) != before:
            results = Results(study, runs, now)
            results.write(args.out)
            draw(results, args.out)
            before = now

    args.out.mkdir(parents=True, exist_ok=True)
    executor = Executor(folder, study.shots, args.cpu_processes, pace, speak)
    code = executor.train(left, settle)
    settle()
    results = Results(study, runs, folder.records(runs))
    if args.json:
        print(json.dumps(results.as_json()))
    else:
        speak(f"{args.out / 'table.md'}, {args.out / 'study.json'}, {args.out / study.name}.png (and .svg, -dark)")
    if executor.failed:
        names = "; ".join(run.title for run in executor.failed)
        say(f"fastvit: {counted(len(executor.failed), 'run')} failed: {names}", file=sys.stderr)
    return code


def _slurm_command(args: argparse.Namespace, chosen: "list[PlannedRun]", folder: "StudyFolder") -> str:
    """What submits the runs that are not finished: one job of an array each."""
    records = folder.records(chosen)
    left = [run.number for run in chosen if records.get(run.name, {}).get("state") != "finished"]
    if not left:
        raise UserError(f"all runs of the study are finished: nothing to submit; {args.out} has the results")
    words = [args.study, *(word for one in args.set for word in ("--set", one))]
    words += ["--seeds", str(args.seeds)] if args.seeds else []
    words += ["--out", os.path.abspath(args.out)]
    return f"sbatch --array={_ranges(left)} {_SCRIPT} {shlex.join(words)}"


def _ranges(numbers: list[int]) -> str:
    """Numbers in ascending order as sbatch takes them: "0,3-17"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
