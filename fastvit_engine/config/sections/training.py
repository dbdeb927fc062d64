"""What a run minimises, for how long, in which batches and precision."""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
)

from fastvit_engine.config.sections.base import MOST_SAMPLES, Section, distinct
from fastvit_engine.duration import Duration

MOST_PROFILED = 20  # steps
_MOST_BLOCKS = 10_000
OBJECTIVES = ("classify", "dino", "mae", "masked_patch", "moco")  # of the engine
Rank = Annotated[int, Field(ge=0, lt=1_000_000)]


def _as_text(steps: Any) -> Any:
    """One step, which YAML and Python write as a number, as text."""
    return str(steps) if type(steps) is int else steps


def _window(text: str) -> str:
    """Steps to profile, if they can be: they are recorded in memory."""
    first, last = profiled_steps(text)
    if not 1 <= first <= last:
        raise ValueError("the first step is 1, and the last must not come before the first")
    if last - first >= MOST_PROFILED:
        raise ValueError(f"at most {MOST_PROFILED} steps can be profiled")
    return text


def profiled_steps(text: str) -> tuple[int, int]:
    """The first and the last step of "100-105", or of "100"."""
    if re.fullmatch(r"[0-9]{1,18}(-[0-9]{1,18})?", text) is None:
        raise ValueError("write the first and the last step, such as 100-105, or one step")
    first, _, last = text.partition("-")
    return int(first), int(last or first)


def _objective(name: str) -> str:
    module, _, attribute = name.partition(":")
    if name not in OBJECTIVES and not all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
        raise ValueError(f"write {', '.join(OBJECTIVES)}, or MODULE:NAME for an objective of your own")
    return name


class ProfileConfig(Section):
    """Some steps recorded by PyTorch's profiler, as a trace and as a table by kernel in profile/ of the run folder."""

    steps: Annotated[str, BeforeValidator(_as_text), AfterValidator(_window)] | None = None
    """First and last step to profile, such as 100-105, at most 20; or one step, such as 100; null: none."""

    ranks: Annotated[tuple[Rank, ...], AfterValidator(distinct)] = Field((0,), min_length=1)
    """Processes to profile, by rank."""


def _blocks(value: object) -> object:
    """A number of blocks, from text too. Raises ValueError."""
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if value in ("auto", "all") or (
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_BLOCKS
    ):
        return value
    raise ValueError(f"write auto, all, or a number of blocks from 0 to {_MOST_BLOCKS}")


class Fp8Config(Section):
    """Matrix products in FP8, if train.precision is fp8: what of the blocks, and when to return to bf16."""

    scaling: Literal["tensor", "row"] = "tensor"
    """How operands are scaled to the range of FP8. tensor: one scale per matrix, the fastest; row: one per row of each
    operand, more accurate. Scales follow from the operands themselves, in every step."""

    layers: Annotated[tuple[Literal["qkv", "proj", "fc1", "fc2"], ...], AfterValidator(distinct)] = Field(
        ("qkv", "proj", "fc1", "fc2"), min_length=1
    )
    """Linear layers of a block whose three products are in FP8: queries, keys and values; the projection of attention;
    the two layers of the MLP. All others, and all else, are in bf16."""

    bf16_first_blocks: int = Field(0, ge=0, le=_MOST_BLOCKS)
    """Number of blocks at the beginning of the model that stay in bf16."""

    bf16_last_blocks: int = Field(0, ge=0, le=_MOST_BLOCKS)
    """Number of blocks at the end of the model that stay in bf16."""

    fallback_after: int | None = Field(20, gt=0, le=1_000_000)
    """Consecutive steps in which a scale of a layer is out of range, after which this layer returns to bf16 for the
    rest of the run; null: never."""

    emulate: bool = False
    """Compute FP8 in plain PyTorch on a device that has no FP8 products. Slower than bf16: to try it out."""


class TrainConfig(Section):
    """Length of the training, batch size, and numerical precision."""

    objective: Annotated[str, AfterValidator(_objective)] = "classify"
    """What training minimises. classify: the loss on the labels. mae: the error of a masked autoencoder, which predicts
    the pixels of hidden patches and needs no labels, see section mae. masked_patch: that of predicting the colours of
    corrupted patches, without labels, see section masked_patch. dino: what an average of the weights makes of other
    crops of the image, without labels, see section dino. moco: which of all images another crop is of, without labels,
    see section moco. MODULE:NAME: an objective of your own, a class or function in a Python module, which is imported
    from the working directory or PYTHONPATH."""

    duration: Duration = "90 epochs"
    """Length of the run: epochs, steps or samples."""

    global_batch_size: int = Field(4096, gt=0, le=MOST_SAMPLES)
    """Images per optimizer step, over all processes."""

    micro_batch_size: int | None = Field(None, gt=0, le=MOST_SAMPLES)
    """Most images that a process takes at a time; null: as many as fit into its memory."""

    micro_batch_trial: bool = False
    """Try, when the run starts, how many images a GPU takes at a time, rather than compute it: the step of training is
    taken with several micro-batches, and the largest that fits is remembered. Needs GPUs."""

    precision: Literal["fp32", "bf16", "fp16", "fp8"] = "bf16"
    """Number format of activations and gradients. Master weights and optimizer states are always fp32. fp8: bf16, and
    the matrix products of the blocks in FP8, on Hopper GPUs and later, see train.fp8."""

    fp8: Fp8Config = Fp8Config()

    recompute: Literal["auto", "none", "gelu", "all"] = "auto"
    """What the backward pass of a fused block computes again instead of keeping it: nothing, the GELU, or both
    normalisations too. auto: as little as memory allows. Has no effect on plain PyTorch."""

    activation_checkpointing: Annotated[Literal["auto", "all"] | int, BeforeValidator(_blocks)] = "auto"
    """Blocks that keep their input alone for the backward pass, which computes the rest again: how many, the first
    ones, or all. All of them compute a third more. auto: none, or as few as possible where nothing fits without."""

    offload_activations: bool = False
    """Keep the inputs of these blocks in host memory until the backward pass. Needs a GPU."""

    memory_gib: float | None = Field(None, gt=0, le=1e6)
    """Most memory of each device, in GiB, that weights, optimizer and activations are planned for: ZeRO stage,
    micro-batch, recompute and activation_checkpointing are chosen to fit. null: all but a reserve."""

    compile: bool = False
    """Compile the model with torch.compile, all but fused operations. Takes minutes when a run starts. For models of
    timm, hybrids and ResNets."""

    cuda_graph: bool = False
    """Capture forward and backward passes of the model in CUDA graphs: for small micro-batches, where launching kernels
    takes longer than they do. Needs a GPU and more memory. For this engine's Vision Transformers at ZeRO 0 to 2."""

    grad_clip: float | None = Field(1.0, gt=0, le=1e9)
    """Largest global norm of the gradient; null: no clipping."""

    log_every: int = Field(50, gt=0)
    """Steps between two rows of metrics."""

    profile: ProfileConfig = ProfileConfig()

    @property
    def number_format(self) -> Literal["fp32", "bf16", "fp16"]:
        """What all is computed in that is not in FP8."""
        return "bf16" if self.precision == "fp8" else self.precision
