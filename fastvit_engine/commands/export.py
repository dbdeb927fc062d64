"""`fastvit export`: writes the weights of a checkpoint as one safetensors file."""

import argparse

from fastvit_engine.commands.parser import local_path
from fastvit_engine.shown import say


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", purpose: str) -> None:
    parser = commands.add_parser(
        "export",
        help=purpose,
        description="Writes the fp32 weights of a checkpoint, or their moving average, as one safetensors file with\n"
        "timm's parameter names. Prints the Python code that loads it into timm, strictly. The file's metadata holds\n"
        "this code too, the class names, and how to prepare images. Needs the checkpoint alone: no GPU, little memory.",
        epilog="examples:\n  fastvit export runs/b16 --out b16.safetensors\n"
        "  fastvit export runs/b16/checkpoints/step-00050000 --out b16_ema.safetensors --ema\n"
        "  fastvit export s3://bucket/b16 --out b16.safetensors",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        metavar="RUN_OR_CHECKPOINT",
        help="a run folder (its latest checkpoint) or a checkpoint; path or URL",
    )
    parser.add_argument("--out", metavar="FILE", type=local_path, required=True, help="the file to write")
    parser.add_argument("--ema", action="store_true", help="export the moving average of the weights instead")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from fastvit_engine.checkpoint.export import export_weights, find_checkpoint
    from fastvit_engine.models.weights.safetensors_file import describe_for_timm

    checkpoint = find_checkpoint(args.source)
    export_weights(checkpoint, args.out, "ema" if args.ema else "weight")
    say(f"{args.out}: {'average of the weights' if args.ema else 'weights'} of {checkpoint}")
    say(describe_for_timm(args.out))
    return 0
