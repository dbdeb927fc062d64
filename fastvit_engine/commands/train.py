"""`fastvit train`: trains the model of a recipe, in new processes or as one rank of a job already started."""

import argparse
import os
import shlex
import sys
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

from fastvit_engine.commands.loading import loading_pytorch
from fastvit_engine.commands.recipe import add_init, add_recipe, settings_of
from fastvit_engine.distributed.environment import VERBOSE
from fastvit_engine.errors import RestartError, Sentence, UserError
from fastvit_engine.shown import say
from fastvit_engine.sizing.gpus import GPU_MEMORY_GIB

if TYPE_CHECKING:
    from fastvit_engine.config import Resolved
    from fastvit_engine.observe.run_folder import RunFolder


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", purpose: str) -> None:
    parser = commands.add_parser(
        "train",
        help=purpose,
        description="Trains the model of a recipe, from scratch or from the weights of another: on every GPU of this\n"
        "machine, on CPU processes if it has none, or as one rank of the job that torchrun, srun or deepspeed started.",
        epilog="signals: SIGTERM, SIGUSR1, SIGHUP or Ctrl-C finishes the step, saves and exits with code 76; a\n"
        "second one ends the run at once. SIGQUIT writes stack traces into the run folder, as\n"
        "`fastvit stacks` does.\n\n"
        "examples:\n  fastvit train vit_b16_i21k --set data.train=data/i21k --out runs/b16 --resume auto\n"
        "  fastvit train finetune_photos --init ViT-B_16.npz --set data.train=photos --set model.num_classes=12",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe(parser)
    add_init(parser)
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="run folder, a path or a URL of an object store such as s3://BUCKET/RUN (default: runs/<name of the "
        "recipe>)",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        choices=["auto", "never"],
        const="auto",
        default="never",
        help="auto, or no value: continue the run that the folder holds; never (default): refuse a folder that holds "
        "one",
    )
    parser.add_argument(
        "--allow-batch-change",
        action="store_true",
        help="resume with another train.global_batch_size than the checkpoint's. The order of samples continues; what "
        "has a length in epochs or samples keeps it, and takes another number of steps",
    )
    parser.add_argument(
        "--cpu-processes",
        metavar="N",
        type=int,
        default=1,
        help="processes to start if there is no GPU (default: 1)",
    )
    parser.add_argument(
        "--max-restarts",
        metavar="N",
        type=int,
        default=3,
        help="on one machine: times that processes which hang or are killed are started again, counted from the last "
        "new checkpoint (default: 3)",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="show what DeepSpeed and the launcher log by themselves, too"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check all that can be checked without starting, show what a start would do, and write nothing",
    )
    dry = parser.add_argument_group(
        "what --dry-run assumes", "without them: the processes that a start would have here"
    )
    dry.add_argument("--processes", metavar="N", type=_numbers, help="of the whole job; MIN:MAX if it is elastic")
    dry.add_argument("--processes-per-node", metavar="N", type=int, help="default: 8, or all if there are fewer")
    dry.add_argument(
        "--gpu", choices=list(GPU_MEMORY_GIB), help="the run is for other machines than this one, with such a GPU each"
    )
    parser.set_defaults(run=_run, failed=_end_with_others)


def _numbers(text: str) -> tuple[int, ...]:
    """N or MIN:MAX, as numbers of which the largest comes first."""
    numbers = sorted({int(number) for number in text.split(":")}, reverse=True)
    if not 1 <= len(numbers) <= 2 or numbers[-1] < 1:
        raise ValueError
    return tuple(numbers)


def _run(args: argparse.Namespace) -> int:
    _check_options(args)
    if args.verbose:
        os.environ[VERBOSE] = "1"
    from fastvit_engine.config import load_config

    settings = settings_of(args)
    resolved = load_config(args.recipe, settings)  # before PyTorch is loaded: a typing error is told at once

    if args.dry_run:
        return _dry_run(args, resolved)

    with loading_pytorch():
        from fastvit_engine.checkpoint import store_of
        from fastvit_engine.checkpoint.export import export_run
        from fastvit_engine.checkpoint.owner import RUN_ID, own
        from fastvit_engine.checkpoint.records import kept_records
        from fastvit_engine.checkpoint.store import step_of
        from fastvit_engine.data.stream.worker_pool import lost_worker
        from fastvit_engine.distributed import launch
        from fastvit_engine.distributed.environment import launched_by_cluster
        from fastvit_engine.distributed.rendezvous import check_rendezvous
        from fastvit_engine.objectives import find_objective
        from fastvit_engine.observe.run_folder import run_folder
        from fastvit_engine.sizing.defaults import choose
        from fastvit_engine.sizing.machine import machine_here
        from fastvit_engine.train.first_weights import fill_in
        from fastvit_engine.train.observers import check_installed
        from fastvit_engine.train.restarts import restarts
        from fastvit_engine.train.start import preflight, report_damage
        from fastvit_engine.trusted_folders import trust_compiled_code

    check_installed(resolved.config.observe)
    run = run_folder(args.out or f"runs/{resolved.config.name}")
    resume = args.resume == "auto"
    if launched_by_cluster():
        with loading_pytorch():
            from fastvit_engine.train.loop import train

        check_rendezvous()
        try:
            train(resolved, run, resume=resume, allow_batch_change=args.allow_batch_change)
        except RuntimeError as error:
            if (message := lost_worker(error)) is None:
                raise
            raise RestartError(message) from error
        return 0

    trust_compiled_code()
    find_objective(resolved.config.train.objective)
    processes = launch.processes_here(args.cpu_processes)
    resolved = fill_in(resolved, run, resume=resume).apply(resolved)
    chosen = choose(resolved.config, machine_here(processes))
    environment = {**os.environ, RUN_ID: uuid.uuid4().hex}  # of the ranks, which belong to this process
    with own(chosen.config.checkpoint, run, environment) as owned, kept_records(run, owned) as records:
        start = preflight(chosen.config, run, processes, resume=resume, allow_batch_change=args.allow_batch_change)
        if start.step == start.total_steps:
            report_damage(run, start.damaged, start.checkpoint)
            if start.checkpoint:
                export_run(start.checkpoint, run)
            records.insist()
            say(start.message)
            return 0
        command = _rank_command(args, run)
        store = store_of(chosen.config.checkpoint, run)

        on_gpu = launch.gpu_count() > 0
        with restarts(chosen.config, processes, args.max_restarts, environment, on_gpu=on_gpu) as how:

            def progress() -> tuple[str | None, int | None]:
                return max(store.names(), key=step_of, default=None), how.newest_step()

            return launch.run_with_restarts(
                command, processes, run, args.max_restarts, how.environment, owned.check, progress, how.fast
            )


def _check_options(args: argparse.Namespace) -> None:
    if args.cpu_processes < 1:
        raise UserError(f"--cpu-processes is {args.cpu_processes}: at least 1")
    if args.max_restarts < 0:
        raise UserError(f"--max-restarts is {args.max_restarts}: at least 0")
    for option in ("processes", "processes_per_node", "gpu"):
        if getattr(args, option) is not None and not args.dry_run:
            raise UserError(
                f"--{option.replace('_', '-')} is of --dry-run: add that, or leave it out, since the launcher decides"
            )
    if args.processes_per_node is not None and args.processes_per_node < 1:
        raise UserError(f"--processes-per-node is {args.processes_per_node}: at least 1")


def _rank_command(args: argparse.Namespace, run: "RunFolder") -> list[str]:
    """What each process of a job on this machine runs, after `python -m fastvit_engine`."""
    flags = ["--allow-batch-change"] if args.allow_batch_change else []
    flags += ["--verbose"] if args.verbose else []
    overrides = [word for override in settings_of(args) for word in ("--set", override)]
    out = run.url or str(run.path)
    return ["train", args.recipe, "--out", out, "--resume", args.resume, *flags, *overrides]


def _dry_run(args: argparse.Namespace, resolved: "Resolved") -> int:
    """Says what a start would do. As one of the ranks that a launcher started, only the first does."""
    from fastvit_engine.distributed.environment import launched_by_cluster

    launched = launched_by_cluster()
    if launched and os.environ["RANK"] != "0":
        return 0

    with loading_pytorch():
        from fastvit_engine.distributed.launch import processes_here
        from fastvit_engine.distributed.supervise import rank_environment
        from fastvit_engine.objectives import find_objective
        from fastvit_engine.observe.run_folder import run_folder
        from fastvit_engine.train.dry_run import Target, dry_run

    find_objective(resolved.config.train.objective)
    run = run_folder(args.out or f"runs/{resolved.config.name}")
    here, per_node = processes_here(args.cpu_processes), None
    if launched:
        here, per_node = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or None
    processes = args.processes or (here,)
    if args.processes_per_node is not None or per_node is None:
        usual = min(processes[0], 8) if args.processes else here
        per_node = args.processes_per_node or usual
    target = Target(processes, per_node, args.gpu)
    resume = args.resume == "auto"
    say(dry_run(resolved, run, target, resume=resume, allow_batch_change=args.allow_batch_change))
    if not launched and args.processes is None:
        variables = rank_environment(0, here, 0)
        kept = {name: value for name, value in variables.items() if name.endswith(("_IFNAME", "_THREADS"))}
        say("# each process runs:")
        say("\n".join(f"export {name}={shlex.quote(value)}" for name, value in kept.items()))
        say(shlex.join([sys.executable, "-m", "fastvit_engine", *_rank_command(args, run)]))
    return 0


def _end_with_others(error: Sentence, speak: Callable[[str], None]) -> int:
    """Ends a rank together with the others of its job, of which one says why. Returns the exit code."""
    from fastvit_engine.distributed.environment import launched_by_cluster

    try:
        launched = launched_by_cluster()
    except UserError:  # the environment itself is what is bad
        launched = False
    if not launched:
        speak(str(error))
        return error.exit_code

    from fastvit_engine.distributed.roll_call import end_with_others

    return end_with_others(error, speak)
