"""The options of `fastvit plan`: what contradicts what, and the machines and speeds that they describe."""

import argparse
from typing import TYPE_CHECKING

from fastvit_engine.commands.parser import local_path
from fastvit_engine.errors import UserError
from fastvit_engine.sizing.gpus import GPU_MEMORY_GIB, USUAL_MFU
from fastvit_engine.sizing.interconnects import BETWEEN, WITHIN, Interconnect, named, of_figures, usual

if TYPE_CHECKING:
    from fastvit_engine.config import Config
    from fastvit_engine.sizing.machine import Machine
    from fastvit_engine.sizing.step_time import Speed

CPU = "cpu"
_PER_NODE = 8


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", metavar="N", type=int, help="GPUs of the whole job; with --gpu cpu, processes")
    parser.add_argument("--nodes", metavar="N", type=int, help="nodes of the job, in place of --gpus")
    parser.add_argument("--gpus-per-node", metavar="N", type=int, help="default: 8, or all if there are fewer")
    parser.add_argument(
        "--gpu", choices=[*GPU_MEMORY_GIB, CPU], default="H100", help="their model, or cpu (default: H100)"
    )
    parser.add_argument("--gpu-memory", metavar="GIB", type=float, help="of each GPU (default: that of the model)")
    network = parser.add_argument_group("network (default: what is usual for the GPU, and infiniband-ndr400)")
    network.add_argument(
        "--interconnect",
        metavar="NAME",
        help=f"WITHIN+BETWEEN nodes, or one of both: {', '.join([*WITHIN, *BETWEEN])}",
    )
    for option, what in (
        ("--bandwidth", "of each GPU in one direction, GB/s"),
        ("--latency", "of a message, microseconds"),
    ):
        network.add_argument(
            option, nargs=2, type=float, metavar=("WITHIN", "BETWEEN"), help=f"{what}: within a node, between nodes"
        )
    speed = parser.add_argument_group("speed of a device alone (default: --mfu 0.4)")
    only = speed.add_mutually_exclusive_group()
    only.add_argument("--mfu", metavar="SHARE", type=float, help="assumed of what it computes, of 1")
    only.add_argument(
        "--measured", metavar="FILE", type=local_path, help="result of `fastvit bench train` on such a one"
    )
    only.add_argument("--seconds-per-image", metavar="S", type=float, help="forward, backward and update")
    only.add_argument("--cpu-gflops", metavar="G", type=float, help="GFLOP/s of a process in training, with --gpu cpu")
    rest = parser.add_argument_group("more")
    rest.add_argument("--price", metavar="P", type=float, help="of an hour of a GPU, in any currency")
    rest.add_argument("--sample-kb", metavar="KB", type=float, help="mean size of a sample (default: 105, photos)")
    rest.add_argument("--out", metavar="DIR", type=local_path, help="write a picture of 1 to 512 GPUs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def check(args: argparse.Namespace) -> None:
    """Raises UserError for a figure that makes no sense, before anything is loaded."""
    if args.mfu is not None and not 0 < args.mfu <= 1:
        raise UserError(f"--mfu is {args.mfu:g}: a share above 0 and up to 1, such as 0.4")
    for name in ("seconds_per_image", "cpu_gflops", "sample_kb", "price"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 1e12:
            raise UserError(f"--{name.replace('_', '-')} is {value:g}: a positive figure")
    if args.gpu != CPU:
        if args.cpu_gflops is not None:
            raise UserError(f"--cpu-gflops is for --gpu cpu, and the GPU is {args.gpu}: leave one of them out")
        return
    if args.mfu is not None:
        raise UserError("--mfu is a share of a GPU's peak: with --gpu cpu, give --cpu-gflops or --seconds-per-image")
    if args.cpu_gflops is None and args.seconds_per_image is None and args.measured is None:
        raise UserError("--gpu cpu has no peak to assume: give --cpu-gflops, --seconds-per-image or --measured")
    if args.gpu_memory is None:
        raise UserError("--gpu cpu has no memory to assume: give --gpu-memory, that of each process in GiB")


def processes_of(args: argparse.Namespace) -> tuple[int, int]:
    """Those of the whole job, and of each node."""
    for name in ("gpus", "nodes", "gpus_per_node"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}: at least 1")
    if args.gpus is None and args.nodes is None:
        raise UserError("how large is the job? Give --gpus, or --nodes")
    if args.gpus is None:
        per_node = args.gpus_per_node or _PER_NODE
        return args.nodes * per_node, per_node
    if args.nodes is not None:
        per_node = args.gpus_per_node or args.gpus // args.nodes
        if per_node * args.nodes != args.gpus:
            each = "as many GPUs on each" if args.gpus_per_node is None else f"--gpus-per-node {args.gpus_per_node}"
            raise UserError(f"--gpus {args.gpus} are not --nodes {args.nodes} with {each}: leave one of them out")
        return args.gpus, per_node
    per_node = args.gpus_per_node or min(args.gpus, _PER_NODE)
    if args.gpus % per_node:
        raise UserError(f"--gpus-per-node {per_node} does not divide --gpus {args.gpus}: every node has as many")
    return args.gpus, per_node


def machine_of(args: argparse.Namespace) -> "Machine":
    from fastvit_engine.sizing.machine import Machine

    processes, per_node = processes_of(args)
    gib = memory_gib(args)
    return Machine(processes, per_node, int(gib * 2**30), on_gpu=args.gpu != CPU)


def memory_gib(args: argparse.Namespace) -> float:
    gib = float(args.gpu_memory if args.gpu_memory is not None else GPU_MEMORY_GIB[args.gpu])
    if not (2 if args.gpu != CPU else 0) < gib < 1e6:
        raise UserError(f"--gpu-memory is {gib:g} GiB: too little for any training")
    return gib


def interconnect_of(args: argparse.Namespace) -> Interconnect:
    if (args.bandwidth is None) != (args.latency is None):
        missing, given = ("--latency", "--bandwidth") if args.latency is None else ("--bandwidth", "--latency")
        raise UserError(f"{given} needs {missing} beside it: both decide how long a message takes")
    if args.bandwidth is not None:
        if args.interconnect is not None:
            raise UserError("--interconnect and --bandwidth say the same thing twice: leave one of them out")
        return of_figures(tuple(args.bandwidth), tuple(args.latency))
    if args.interconnect is not None:
        return named(args.interconnect, None if args.gpu == CPU else args.gpu)
    if args.gpu != CPU:
        return usual(args.gpu)
    processes, _ = processes_of(args)
    if processes > 1:
        raise UserError("processes on CPUs have no usual network: give --bandwidth and --latency, or --interconnect")
    return of_figures((1, 1), (0, 0))


def speed_of(args: argparse.Namespace, config: "Config") -> "Speed":
    from fastvit_engine.sizing.compute import assumed_of_cpu, assumed_of_gpu, given, measured
    from fastvit_engine.sizing.step_time import Speed

    interconnect = interconnect_of(args)
    if args.measured is not None:
        return Speed(measured(args.measured, config, args.gpu), interconnect)
    if args.seconds_per_image is not None:
        return Speed(given(args.seconds_per_image), interconnect)
    if args.cpu_gflops is not None:
        return Speed(assumed_of_cpu(config, args.cpu_gflops), interconnect)
    mfu = mfu_of(args)
    assert mfu is not None
    return Speed(assumed_of_gpu(config, args.gpu, mfu), interconnect)


def mfu_of(args: argparse.Namespace) -> float | None:
    """As assumed; None if speed is given or measured."""
    if args.gpu == CPU or args.measured is not None or args.seconds_per_image is not None:
        return None
    return USUAL_MFU if args.mfu is None else float(args.mfu)
