"""How many bytes of weights, gradients and optimizer a process needs under each ZeRO stage.

It is what DeepSpeed 0.19 allocates, part by part; a test counts its tensors. P is the number of parameters, W
the number of processes, c the bytes of a computed number (4; 2 for bf16 and fp16), a those of an accumulated gradient.
With AdamW ("others": fp16, and offloaded states):

| stage             | weights | gradients      | optimizer             |
|-------------------|---------|----------------|-----------------------|
| 0, fp32           | c P     | c P            | 8 P (Adam's moments)  |
| 0, bf16 and fp16  | c P     | c P            | 12 P (fp32 weights)   |
| 1, a = c          | c P     | c P            | 12 P / W              |
| 1, a > c, bf16    | c P     | (a + c) P      | 12 P / W              |
| 1, a > c, others  | c P     | a P            | 12 P / W              |
| 2                 | c P     | a P / W        | 12 P / W              |
| 3                 | c P / W | a P / W        | 12 P / W              |

The other optimizers keep other state than AdamW's 8 P: SGD and Lion 4 P (SGD without momentum none), Muon 4 P for the
matrices of the blocks and 8 P for the rest, LAMB 8 P, Adafactor 2 P and 4 P more for what is not factored. Parameters
that do not learn have weights and, but for stage 0 in fp32, an fp32 copy (4 P; 4 P / W from stage 1 on), and neither
gradients nor moments.
"""

from dataclasses import dataclass, replace

from fastvit_engine.config import Config, OptimizerConfig
from fastvit_engine.engine.optimizers.kinds import KINDS, updates_in_place
from fastvit_engine.engine.optimizers.state import STATE_BYTES
from fastvit_engine.sizing.parameters import COMPUTE_BYTES, ParameterCounts

_ADAMW = OptimizerConfig()

UNBUCKETED = 500_000_000  # elements that DeepSpeed's stage 0 reduces at a time


@dataclass(frozen=True)
class Buckets:
    """The sizes of DeepSpeed's buffers, in numbers."""

    reduce: int = 0
    doubled: bool = False  # by overlap_comm, under stages 1 and 2
    gathered: int = 0  # stage 3: parameters that are whole at a time, at the most
    secondary_shards: int = 1  # stage 3: zero_hpz_partition_size


@dataclass(frozen=True)
class Memory:
    """Bytes that one process needs on its device at a time, at the most."""

    weights: int
    gradients: int
    optimizer: int  # fp32 weights and moments
    average: int  # of the weights
    buffers: int  # reduction buckets, gathered parameters
    update: int  # while gradients are reduced and weights updated: passes before the next forward pass
    activations: int = 0  # of one micro-batch, kept for the backward pass
    work: int = 0  # while the backward pass goes through one block
    captured: int = 0  # what CUDA graphs compute in, and keep for it
    host: int = 0  # offloaded, in the memory of the host

    @property
    def state(self) -> int:
        """What stays, or comes back with every step."""
        return self.weights + self.gradients + self.optimizer + self.average + self.buffers + self.captured

    @property
    def total(self) -> int:
        """Activations are gone when the update begins."""
        return self.state + max(self.update, self.activations + self.work)


def accumulation_bytes(config: Config, stage: int) -> int:
    """Of a gradient that is summed up over micro-batches: fp32 under ZeRO, unless the recipe says otherwise."""
    given = (config.deepspeed.get("data_types") or {}).get("grad_accum_dtype")
    if given is not None:
        return COMPUTE_BYTES.get(given, 4)
    return 4 if stage > 0 else COMPUTE_BYTES[config.train.precision]


def reduces_in_place(config: Config, stage: int) -> bool:
    """Whether all gradients are reduced at once, where they lie: without ZeRO, and by DeepSpeed's bf16 optimizer."""
    return stage == 0 or _is_bf16_optimizer(
        config.train.precision, accumulation_bytes(config, stage), stage, config.zero.offload
    )


def _is_bf16_optimizer(precision: str, accumulate_bytes: int, stage: int, offload: str) -> bool:
    """Stage 1 with fp32 sums of bf16 gradients is another class of DeepSpeed than the rest of ZeRO."""
    return stage == 1 and precision in ("bf16", "fp8") and accumulate_bytes == 4 and offload == "none"


def state_memory(
    counts: ParameterCounts,
    precision: str,
    stage: int,
    world_size: int,
    *,
    offload: str,
    accumulate_bytes: int,
    accumulates: bool,
    average: bool,
    buckets: Buckets,
    on_gpu: bool,
    optimizer: OptimizerConfig = _ADAMW,
) -> Memory:
    """All but the activations. See the table above; `update` and `buffers` are explained where they are computed."""
    compute = COMPUTE_BYTES[precision]
    total, whole = counts.parameters, counts.learning
    total_share, share = -(-total // world_size), -(-whole // world_size)
    sums_apart = accumulate_bytes != compute

    masters = 0 if stage == 0 and precision == "fp32" else 4 * (total if stage == 0 else total_share)
    kind = KINDS[optimizer.kind]
    kept = sum(STATE_BYTES[optimizer.kind](optimizer, name, shape) for name, shape in counts.learning_shapes)
    states = masters + (kept if stage == 0 else -(-kept * share // whole))
    weights = compute * (total_share if stage == 3 else total)
    own_class = _is_bf16_optimizer(precision, accumulate_bytes, stage, offload)
    if stage == 1 and sums_apart:  # all but the bf16 optimizer drop a gradient when it is added to its sum
        gradients = (accumulate_bytes + (compute if own_class else 0)) * whole
    else:
        gradients = compute * whole if stage <= 1 else accumulate_bytes * share

    in_place = stage == 0 or own_class
    once = _copies_once(stage, compute, accumulate_bytes, offload, buckets, on_gpu=on_gpu)
    if stage == 3:
        buffers = compute * (buckets.reduce + buckets.gathered)
        buffers += compute * -(-total // buckets.secondary_shards) if buckets.secondary_shards > 1 else 0
    elif in_place or (once and (stage == 1 or world_size == 1)):
        buffers = 0
    else:
        buffers = (accumulate_bytes if stage == 1 else compute) * buckets.reduce * (2 if buckets.doubled else 1)

    # The copies that reduction and update make. What is fused, on a GPU, updates in place.
    tensor, held = (counts.largest_learning, whole) if stage == 0 else (share, share)
    scratch = None if updates_in_place(optimizer, on_gpu=on_gpu) else kind.scratch_bytes
    made = 0 if scratch is None else scratch(optimizer, tensor, held)
    if stage == 0:
        flattened = compute * min(whole, UNBUCKETED) if world_size > 1 else 0
        update = max(flattened, made + (4 * whole if compute < 4 else 0))
    elif in_place:
        update = max(compute * whole, made)
    elif once:
        update = made
    else:
        copied = 4 * share if stage == 3 or not sums_apart else 0
        summand = accumulate_bytes * share if stage == 2 and accumulates and not sums_apart else 0
        update = max(made + copied, summand)

    averages = 4 * (total if stage == 0 else total_share) * average
    state = Memory(weights, gradients, states, averages, buffers, update)
    return state if offload == "none" else _offloaded(state, counts, compute, share, stage, everything=offload == "all")


def _copies_once(stage: int, compute: int, accumulate: int, offload: str, buckets: Buckets, *, on_gpu: bool) -> bool:
    """Whether a gradient is copied once, to where the optimizer reads it: see engine/deepspeed_gradients.py."""
    return not on_gpu and offload == "none" and not buckets.doubled and (stage > 1 or accumulate == compute)


def _offloaded(
    state: Memory, counts: ParameterCounts, compute: int, share: int, stage: int, *, everything: bool
) -> Memory:
    """Optimizer, average and the update's gradients in host memory; with `everything`, the sharded weights too."""
    host = state.optimizer + state.average + 4 * share  # an fp32 gradient beside each master weight
    host += compute * share if stage < 3 else 0  # the new weights on their way to the device
    kept = replace(state, optimizer=0, average=0, update=0, host=host)
    if stage < 3:
        kept = replace(kept, buffers=state.buffers + 2 * compute * counts.largest)
    return replace(kept, weights=0, host=host + state.weights) if everything else kept
