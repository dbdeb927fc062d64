"""A training step of ViT-H/14 at batch 256 on one H200, by arithmetic: nothing here is measured.

    python -m benchmarks.step_model
    python -m benchmarks.step_model --trace blocks.json --plot step.png

Launches, bytes and FLOPs of this package's blocks come from `benchmarks.block_traffic`, and what DeepSpeed moves from
`benchmarks.deepspeed_copies`; everything else is one of the constants below, each with its source. An error of 8 % in
the sum is to be expected.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.block_traffic import COPY_BYTES_PER_SECOND, json_file
from fastvit_engine.config import Config
from fastvit_engine.files import atomic_write
from fastvit_engine.models import computed_flops, training_flops

RESULTS = Path(__file__).parent / "results" / "model"
MODEL, BATCH, DEPTH = "H/14", 256, 32
PARAMETERS = 632_045_800  # Dosovitskiy et al. 2021, Table 1: 632 M; with a head of 1,000 classes
PEAK_FLOPS = 989e12  # dense bf16, NVIDIA's datasheet of the H200

# Assumed of the hardware. 690: below the 790 of one large product, since a training step runs at the power limit.
PRODUCT_FLOPS = 690e12
BYTES_PER_SECOND = 0.85 * COPY_BYTES_PER_SECOND  # an elementwise kernel against a plain copy
# How much longer than cuBLAS QuACK takes for a product with GELU in its epilogue. QuACK 0.6.5 (the docstring of
# `gemm_epilogue`) gives 0.5 % for an epilogue of rotary embeddings at a depth of 4,096, on a B300: 1.5 % at 1,280. GELU
# has about twice the instructions, and the widest tile without spills is narrower than cuBLAS's. An assumption.
QUACK_LOSS = 0.05

# Milliseconds of attention in all blocks, both passes, at 257 tokens and 16 heads of 80: from published figures of
# Hopper GPUs at 256 to 577 tokens and head dimensions of 64 to 80.
ATTENTION_MS = {
    "serialised": 60.0,  # our kernels when ptxas makes each wgmma wait for the one before it
    "overlapped": 48.0,  # our kernels otherwise
    "cuDNN": 45.0,
    "FlashAttention-2": 95.0,  # what PyTorch's default backend is
}

# GB a block moves elementwise, both passes, counted from the operators of timm's block: PyTorch's eager kernels, and
# the fusions that torch.compile makes. Under autocast the stream between blocks is float32.
TIMM_EAGER_GB, TIMM_COMPILED_GB, TIMM_COMPILED_BF16_GB = 17.3, 10.9, 8.6

# Bytes per parameter and step. AdamW reads weight, gradient and two moments in float32 and writes three of them;
# clipping reads the gradients for their norm, and reads and writes them to scale them; autocast casts weights to bf16
# and gradients back.
ADAMW_BYTES, CLIP_BYTES, CAST_BYTES = 28, 12, 12
DEEPSPEED = "ZeRO-1 bf16"  # the case that counts what DeepSpeed moves besides AdamW on one GPU, clipping included
# The patch embedding, position embedding, final normalisation, head and loss; in float32 the products of the patch
# embedding miss the tensor cores.
ENDS_MS, FP32_PATCH_EMBED_MS = 3.0, 9.5
# Ours normalises the class token alone, and so does without this: the forward pass reads and writes the stream, the
# backward pass reads it and its gradient and writes another, and the gradient of the other tokens is filled with zeros.
TOKENS, WIDTH, NORM_PASSES = 257, 1280, 6

COLOURS = {
    "products": plots.KINDS["matrix products"],
    "attention": plots.KINDS["attention"],
    "elementwise": plots.KINDS["normalisation"],
    "optimizer": plots.KINDS["optimizer"],
    "ends": plots.KINDS["elementwise and rest"],
}


@dataclass(frozen=True)
class Step:
    """One way to train, with the milliseconds of each part."""

    name: str
    products: float
    attention: float
    elementwise: float
    optimizer: float
    ends: float  # what comes before and after the blocks
    flops: float  # computed for an image

    @property
    def ms(self) -> float:
        return self.products + self.attention + self.elementwise + self.optimizer + self.ends

    @property
    def images_per_second(self) -> float:
        return 1e3 * BATCH / self.ms

    @property
    def mfu(self) -> float:
        return self.images_per_second * self.flops / PEAK_FLOPS


def flops_per_image() -> tuple[float, float]:
    """Of the whole model, and of ours, whose last block is for the class token alone."""
    config = Config.model_validate({"model": {"name": MODEL, "image_size": 224, "num_classes": 1000}})
    return training_flops(config.model), computed_flops(config.model)


def bytes_of_deepspeed(counts: Mapping[str, Any]) -> float:
    """Per parameter and step, besides the update. Raises ValueError if the case is not among the counts."""
    for case in counts["cases"]:
        if case["name"] == DEEPSPEED:
            return float(case["bytes"])
    raise ValueError(f"it has no case {DEEPSPEED}: write it again by python -m benchmarks.deepspeed_copies --out")


def ours(trace: Mapping[str, Any], deepspeed_bytes: float, attention: str, patch_embed: str) -> list[Step]:
    """By setting of the trace: with bf16 weights through DeepSpeed at ZeRO-1 and in a bare loop, or under autocast.

    `deepspeed_bytes` are those that DeepSpeed moves per parameter besides the update. Raises ValueError for a trace of
    another model or batch.
    """
    if (trace["model"], trace["batch"]) != (MODEL, BATCH):
        raise ValueError(
            f"the trace is of {trace['model']} at batch {trace['batch']}, and this model is of {MODEL} at batch {BATCH}"
        )
    steps = []
    whole, computed = flops_per_image()
    norm_bytes = NORM_PASSES * BATCH * TOKENS * WIDTH
    for setting, block in trace["blocks"].items():
        totals, autocast = block["totals"], setting.startswith("autocast")
        attention_ms, last = ATTENTION_MS[attention], block.get("last")
        if last is not None:  # it reads keys and values once in each kernel, which takes longer than its products
            attention_ms = attention_ms * (DEPTH - 1) / DEPTH + last["attention"]["ms"]
        flops, size, in_quack = (
            (DEPTH - 1) * totals[kind][unit] + (last or totals)[kind][unit] if kind in totals else 0
            for kind, unit in (("products", "flops"), ("elementwise", "bytes"), ("quack", "flops"))
        )
        ends = ENDS_MS + (FP32_PATCH_EMBED_MS if autocast and patch_embed == "fp32" else 0)
        if last is not None:
            ends -= moved(norm_bytes * (4 if autocast else 2))
        for loop in ("bare loop",) if autocast else ("ZeRO-1", "bare loop"):
            beside_update = deepspeed_bytes if loop == "ZeRO-1" else CLIP_BYTES
            steps.append(
                Step(
                    f"fastvit, {loop}, {setting}",
                    products=1e3 * (flops + QUACK_LOSS * in_quack) / PRODUCT_FLOPS,
                    attention=attention_ms,
                    elementwise=moved(size),
                    optimizer=moved(PARAMETERS * (ADAMW_BYTES + beside_update)),
                    ends=ends,
                    flops=whole if last is None else computed,
                )
            )
    return sorted(steps, key=lambda step: "bare loop" in step.name)


def peers(product_flops: float) -> list[Step]:
    """timm in a bare loop; `product_flops` of a block are the same for everybody. Its last block is like the others."""
    products = 1e3 * DEPTH * product_flops / PRODUCT_FLOPS
    optimizer = moved(PARAMETERS * (ADAMW_BYTES + CLIP_BYTES))
    casts = moved(PARAMETERS * CAST_BYTES)

    def step(name: str, attention: str, gigabytes: float, optimizer: float) -> Step:
        elementwise = moved(DEPTH * gigabytes * 1e9)
        return Step(name, products, ATTENTION_MS[attention], elementwise, optimizer, ENDS_MS, flops_per_image()[0])

    return [
        step("timm eager, autocast", "FlashAttention-2", TIMM_EAGER_GB, optimizer + casts),
        step("timm compiled, autocast", "cuDNN", TIMM_COMPILED_GB, optimizer + casts),
        step("timm compiled, bf16 weights", "cuDNN", TIMM_COMPILED_BF16_GB, optimizer),
    ]


def moved(size: float) -> float:
    """Milliseconds of elementwise kernels."""
    return 1e3 * size / BYTES_PER_SECOND


def table(steps: Sequence[Step]) -> str:
    heads = "".join(f"{part:>13}" for part in COLOURS)
    lines = [f"{'calculated, in ms':<48}{heads}{'step':>8}{'images/s':>10}{'MFU':>7}"]
    for step in steps:
        parts = "".join(f"{getattr(step, part):>13.0f}" for part in COLOURS)
        lines.append(f"{step.name:<48}{parts}{step.ms:>8.0f}{step.images_per_second:>10.0f}{100 * step.mfu:>6.0f}%")
    return "\n".join(lines)


def draw(steps: Sequence[Step], path: Path) -> None:
    """A stacked bar per variant."""
    plt = plots.pyplot()
    figure, axis = plt.subplots(figsize=(10, 1.9 + 0.42 * len(steps)), layout="constrained")
    plots.head(
        figure,
        f"A training step of ViT-{MODEL}, {BATCH} images: calculated, not measured",
        "one H200; from the bytes and FLOPs of each launch and the constants of benchmarks/step_model.py; about ±8 %",
    )
    left = [0.0] * len(steps)
    for part, colour in COLOURS.items():
        widths = [getattr(step, part) for step in steps]
        axis.barh(range(len(steps)), widths, left=left, color=colour, height=0.72, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, step in enumerate(steps):
        axis.text(step.ms, place, f"  {step.images_per_second:,.0f} images/s", va="center", fontsize=8)
    axis.set_yticks(range(len(steps)), [step.name for step in steps], fontsize=8.5)
    axis.set_xlabel("ms per step")
    axis.invert_yaxis()
    axis.margins(x=0.16)
    axis.set_xlim(left=0)
    axis.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=5, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_model",
        description="Calculate a training step of ViT-H/14 at batch 256 on one H200 from what its blocks launch.",
        epilog="example: python -m benchmarks.step_model --trace blocks.json --attention serialised",
    )
    parser.add_argument(
        "--trace", type=Path, default=RESULTS / "blocks.json", help="what `benchmarks.block_traffic --out` wrote"
    )
    parser.add_argument(
        "--deepspeed",
        type=Path,
        default=RESULTS / "deepspeed.json",
        help="what `benchmarks.deepspeed_copies --out` wrote",
    )
    own = ("serialised", "overlapped", "cuDNN")
    parser.add_argument("--attention", choices=own, default="overlapped", help="how ours runs (default overlapped)")
    parser.add_argument(
        "--patch-embed", choices=("bf16", "fp32"), default="bf16", help="of ours under autocast (default bf16)"
    )
    parser.add_argument(
        "--out", type=json_file, metavar="FILE.json", help="write the parts as JSON, and the table beside it"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw stacked bars (png or svg)")
    parsed = parser.parse_args(arguments)
    option = "deepspeed"
    try:
        deepspeed_bytes = bytes_of_deepspeed(json.loads(parsed.deepspeed.read_text()))
        option = "trace"
        trace = json.loads(parsed.trace.read_text())
        steps = ours(trace, deepspeed_bytes, parsed.attention, parsed.patch_embed)
        some = next(iter(trace["blocks"].values()))
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        print(f"--{option} {getattr(parsed, option)}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    steps += peers(some["totals"]["products"]["flops"])
    print(table(steps))
    if parsed.out:
        parsed.out.parent.mkdir(parents=True, exist_ok=True)
        rows = [asdict(s) | {"ms": s.ms, "images_per_second": s.images_per_second, "mfu": s.mfu} for s in steps]
        found = {"trace": parsed.trace.name, "attention": parsed.attention, "patch_embed": parsed.patch_embed}
        found |= {"quack_loss": QUACK_LOSS, "deepspeed_bytes": deepspeed_bytes}
        atomic_write(parsed.out, json.dumps(found | {"measured": False, "steps": rows}, indent=1) + "\n")
        atomic_write(parsed.out.with_suffix(".txt"), table(steps) + "\n")
    if parsed.plot:
        parsed.plot.parent.mkdir(parents=True, exist_ok=True)
        draw(steps, parsed.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
