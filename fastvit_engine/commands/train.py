"""`fastvit train`: trains the model of a recipe, in new processes or as one rank of a job already started."""

import argparse
import os
import uuid

from fastvit_engine.commands.recipe import add_init, add_recipe, settings_of
from fastvit_engine.errors import RestartError, UserError
from fastvit_engine.shown import say


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "train",
        help="train a model, from scratch or from weights",
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
    parser.set_defaults(run=_run, failed=_tell_others)


def _run(args: argparse.Namespace) -> int:
    from fastvit_engine.config import load_config

    settings = settings_of(args)
    resolved = load_config(args.recipe, settings)  # before PyTorch is loaded: a typing error is told at once

    from fastvit_engine.checkpoint import store_of
    from fastvit_engine.checkpoint.export import export_run
    from fastvit_engine.checkpoint.owner import RUN_ID, own
    from fastvit_engine.checkpoint.records import kept_records
    from fastvit_engine.checkpoint.store import step_of
    from fastvit_engine.data.stream.worker_pool import lost_worker
    from fastvit_engine.distributed import launch
    from fastvit_engine.distributed.environment import launched_by_cluster
    from fastvit_engine.distributed.rendezvous import check_rendezvous
    from fastvit_engine.observe.run_folder import run_folder
    from fastvit_engine.sizing.defaults import choose, machine_here
    from fastvit_engine.train.first_weights import fill_in
    from fastvit_engine.train.observers import check_installed
    from fastvit_engine.train.start import preflight, report_damage
    from fastvit_engine.trusted_folders import trust_compiled_code

    check_installed(resolved.config.observe)
    run = run_folder(args.out or f"runs/{resolved.config.name}")
    resume = args.resume == "auto"
    if launched_by_cluster():
        from fastvit_engine.train.loop import train

        check_rendezvous()
        try:
            train(resolved, run, resume=resume, allow_batch_change=args.allow_batch_change)
        except RuntimeError as error:
            if (message := lost_worker(error)) is None:
                raise
            raise RestartError(message) from error
        return 0

    if args.cpu_processes < 1:
        raise UserError(f"--cpu-processes is {args.cpu_processes}: at least 1")
    if args.max_restarts < 0:
        raise UserError(f"--max-restarts is {args.max_restarts}: at least 0")
    trust_compiled_code()
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
        overrides = [word for override in settings for word in ("--set", override)]
        allowed = ["--allow-batch-change"] if args.allow_batch_change else []
        command = [
            "train",
            args.recipe,
            "--out",
            run.url or str(run.path),
            "--resume",
            args.resume,
            *allowed,
            *overrides,
        ]
        store = store_of(chosen.config.checkpoint, run)

        def newest_checkpoint() -> str | None:
            return max(store.names(), key=step_of, default=None)

        return launch.run_with_restarts(
            command, processes, run, args.max_restarts, environment, owned.check, newest_checkpoint
        )


def _tell_others(error: Exception) -> None:
    """Lets the other ranks of a job know if this one has ended, because of bad input, before it joined them."""
    from fastvit_engine.distributed.environment import launched_by_cluster

    try:
        if not isinstance(error, UserError) or not launched_by_cluster():
            return
    except UserError:  # the environment itself is what is bad
        return

    import torch.distributed as dist

    from fastvit_engine.distributed.roll_call import PeerEnded, tell_that_this_rank_ends

    if not dist.is_initialized() and not isinstance(error, PeerEnded):
        tell_that_this_rank_ends(str(error))
