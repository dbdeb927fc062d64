"""How long a device computes for one image: measured, given, or assumed, and said which."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvit_engine.config import Config
from fastvit_engine.errors import UserError
from fastvit_engine.models import run_flops
from fastvit_engine.models.flops import fp8_flops_share
from fastvit_engine.observe.units import format_flops, format_share
from fastvit_engine.sizing.gpus import DATASHEET_FP8_PEAK, known_gpu, matrix_peak

CPU = "cpu"  # in place of a GPU's name
_SAME_MODEL = 0.05  # that the operations of an image may differ by: another head, say
_OURS = ("fastvit ZeRO-1", "fastvit")  # variants of `fastvit bench train` that do what a run does, the nearest first


@dataclass(frozen=True)
class ImageTime:
    """What one device takes for an image, forward, backward and update, without communication.

    source: where the figure comes from, as a clause.
    """

    seconds: float
    source: str
    measured: bool = False


def assumed_of_gpu(config: Config, gpu: str, mfu: float) -> ImageTime:
    """By a share of the datasheet's peak; with FP8, of that of either kind of product.

    Raises UserError if this GPU has no FP8 products.
    """
    peak, flops = matrix_peak(gpu, config.train.precision), run_flops(config).computed
    if config.train.precision == "fp8":
        if gpu not in DATASHEET_FP8_PEAK:
            raise UserError(
                f"train.precision = fp8 is for Hopper GPUs and later ones, and {gpu} is none: set "
                "train.precision=bf16, or --gpu H100"
            )
        fp8_peak, share = DATASHEET_FP8_PEAK[gpu], fp8_flops_share(config)
        source = (
            f"if MFU is {format_share(mfu)} of {format_flops(fp8_peak)}/s per GPU for the {format_share(share)} of the "
            f"operations in FP8, and of {format_flops(peak)}/s for the others (an assumption; passes that quantise are "
            "not counted)"
        )
        return ImageTime(flops * (share / (mfu * fp8_peak) + (1 - share) / (mfu * peak)), source)
    of = " in fp32" if config.train.precision == "fp32" else ""
    source = f"if MFU is {format_share(mfu)} of {format_flops(peak)}/s{of} per GPU (an assumption)"
    return ImageTime(flops / (mfu * peak), source)


def assumed_of_cpu(config: Config, gflops: float) -> ImageTime:
    """By the operations per second that a process reaches in training."""
    source = f"if each process computes {gflops:g} GFLOP/s (given)"
    return ImageTime(run_flops(config).computed / (1e9 * gflops), source)


def given(seconds: float) -> ImageTime:
    return ImageTime(seconds, f"if an image takes {seconds:g} s (given)")


def measured(path: Path, config: Config, device: str) -> ImageTime:
    """From what `fastvit bench train` has written on such a device, for this model in this precision.

    device: a GPU's name, or "cpu". Raises UserError if the file is another, or has nothing of the kind.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--measured {path}: cannot be read as JSON: {error}") from error
    if not isinstance(found, dict) or found.get("suite") != "train":
        raise UserError(f'--measured {path}: no result of `fastvit bench train` (it lacks "suite": "train")')
    gpu = (found.get("environment") or {}).get("gpu")
    here = CPU if gpu is None else known_gpu(gpu)
    if here != device:
        raise UserError(
            f"--measured {path}: measured on {'a CPU' if gpu is None else gpu}, and the plan is for {device}: "
            f"set --gpu to what it was measured on, or measure on {device}"
        )
    wanted, precision = run_flops(config).computed, config.train.precision
    steps = [step for step in _steps(found, path) if abs(step.flops / wanted - 1) <= _SAME_MODEL]
    fitting = [step for step in steps if step.precision == precision]
    if not fitting:
        has = (
            ", ".join(sorted({f"{step.model} in {step.precision}" for step in _steps(found, path)}))
            or "no step of ours"
        )
        raise UserError(
            f"--measured {path} has {has}, and the recipe trains a model of {format_flops(wanted)} per image in "
            f"{precision}: measure that one"
        )
    best = min(fitting, key=lambda step: _OURS.index(step.variant))
    source = f"as measured: {best.variant}, {best.model} at a batch of {best.batch}, {path.name}"
    return ImageTime(best.seconds, source, measured=True)


@dataclass(frozen=True)
class _Step:
    model: str
    batch: int
    precision: str
    variant: str
    seconds: float  # per image
    flops: float  # per image


def _steps(found: Mapping[str, Any], path: Path) -> Sequence[_Step]:
    """Our steps from memory that were found right."""
    try:
        return [
            _Step(
                model=str(case["model"]),
                batch=int(case["batch"]),
                precision=str(case["precision"]),
                variant=str(row["variant"]),
                seconds=1 / float(row["images_per_second"]),
                flops=float(row["mfu"]) * float(row["peak_flops"]) / float(row["images_per_second"]),
            )
            for case in found["cases"]
            for row in case["variants"]
            if row["variant"] in _OURS and row["data"] == "memory" and row["status"] == "ok"
        ]
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"--measured {path}: a result of `fastvit bench train` lacks {error}") from error
