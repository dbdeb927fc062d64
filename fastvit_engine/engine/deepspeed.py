"""DeepSpeed as a `TrainingEngine`: the one module that knows how DeepSpeed works inside (written for version 0.19.8).

DeepSpeed keeps the fp32 master weights and the optimizer's moments in flat buffers, which each of its optimizers cuts
up by rules of its own. A *layout* below knows one of these optimizers. It lists the attributes that it relies on, and
an engine that lacks one is refused when it is built, with a sentence that names the attribute.
"""

import importlib
import logging
import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fastvit_engine.distributed.environment import VERBOSE
from fastvit_engine.engine.deepspeed_gradients import (
    ZERO_1_AND_2_INTERNALS,
    ZERO_3_INTERNALS,
    ShorterWay,
    shorten_zero_1_and_2,
    shorten_zero_3,
)
from fastvit_engine.engine.optimizers.groups import RATE_SCALE
from fastvit_engine.engine.optimizers.partition import Partition, PartitionedOptimizer, Span
from fastvit_engine.engine.protocol import GradientNorm, ParameterSlice
from fastvit_engine.errors import UserError

WRITTEN_FOR = "0.19.8"

# What DeepSpeed's engine object must have.
ENGINE_INTERNALS = (
    "_global_grad_norm",
    "backward",
    "basic_optimizer",
    "clip_fp32_gradients",
    "destroy",
    "device",
    "enable_backward_allreduce",
    "fp16_enabled",
    "global_samples",
    "global_steps",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "micro_steps",
    "module",
    "optimizer",
    "step",
    "train_batch_size",
    "zero_optimization_stage",
)
# What ZeRO-3 must have added to each parameter; `ds_numel` also to its shard, `ds_tensor`.
PARAMETER_INTERNALS = ("ds_numel", "ds_persist", "ds_process_group", "ds_shape", "ds_status", "ds_tensor")
# What a loss scaler adapts while it trains in fp16; its other fields are settings.
SCALER_INTERNALS = ("cur_hysteresis", "cur_iter", "cur_scale", "last_overflow_iter")


def import_deepspeed() -> Any:
    """DeepSpeed, quiet unless VERBOSE is set.

    Without the C++ extension that it would otherwise compile for an inference collective on CPU, and without PyTorch's
    compiler, which it would load for functions of its own Muon: three seconds of every process, and not used here.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(f"training needs DeepSpeed ({error}): pip install 'fastvit-engine[train]'") from error
    if os.environ.get(VERBOSE):
        logging.getLogger("DeepSpeed").setLevel(logging.INFO)
    else:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        from deepspeed.runtime import bf16_optimizer

        bf16_optimizer.see_memory_usage = _nothing  # it prints six lines for every group of parameters
    compiler: Any = importlib.import_module("deepspeed.runtime.compiler")
    compiler.compile = _leave_as_it_is
    # A leaf's gradients, see fastvit_kernels.gathered, would be reduced together after each of its backward passes: too
    # early if a step has several, as for views of two sizes. So they are reduced like all others, when complete.
    stage3: Any = importlib.import_module("deepspeed.runtime.zero.stage3")
    stage3.z3_leaf_parameter = _is_no_leaf
    if not torch.cuda.is_available():
        communication: Any = importlib.import_module("deepspeed.comm.torch")  # the attribute of this name is PyTorch
        communication.build_shm_op = _nothing
        deepspeed.accelerator.get_accelerator().memory_stats = dict  # of this process, by psutil, after each step
    return deepspeed


def forget_process_groups() -> None:
    """Makes DeepSpeed make its process groups anew, for a process that leaves one job and joins another."""
    if "deepspeed" in sys.modules:
        import_deepspeed().utils.groups._release_process_group_references()


@contextmanager
def linear_restored() -> Iterator[None]:
    """Puts PyTorch's `linear` back, which ZeRO-3 exchanges, even if no engine came about that could be closed."""
    linear = nn.functional.linear
    try:
        yield
    finally:
        nn.functional.linear = linear


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]) -> "DeepSpeedEngine":
    """Wraps model and optimizer in a DeepSpeed engine on this process's device.

    Raises UserError if DeepSpeed refuses its `settings`, or is a version that this module does not fit.
    """
    deepspeed, linear = import_deepspeed(), nn.functional.linear
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(settings))
    except (ValidationError, deepspeed.DeepSpeedConfigError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"DeepSpeed refuses its configuration (section 'deepspeed'): {problem}") from error
    return DeepSpeedEngine(engine, linear)


class DeepSpeedEngine:
    """A DeepSpeed engine behind the `TrainingEngine` protocol, at any ZeRO stage and in any precision.

    linear: PyTorch's function, which ZeRO-3 exchanges for one of its own, and `close` puts back.

    Raises UserError for an engine whose state lies on NVMe, and for a DeepSpeed that lacks what is used here.
    """

    def __init__(self, engine: Any, linear: Any = nn.functional.linear) -> None:
        self._linear = linear
        self.model: nn.Module = engine
        self._engine = engine
        self._layout = layout_of(engine)
        missing = missing_internals(engine, self._layout)
        if missing:
            raise UserError(
                f"DeepSpeed {_version()} has no {missing[0]}, which fastvit_engine/engine/deepspeed.py relies on: "
                f"install deepspeed=={WRITTEN_FOR}"
            )
        if self._layout.on_nvme:
            raise UserError("checkpoints of state that DeepSpeed keeps on NVMe are not supported: offload to cpu")
        self.zero_stage: int = engine.zero_optimization_stage()
        _keep_fp32_gradient_norm(engine)
        if self._layout.only_reduces and torch.distributed.get_world_size() == 1:
            # With nobody to reduce with, DeepSpeed still copies all gradients to a buffer and back, rounded to 16 bits.
            engine.enable_backward_allreduce = False
        self._layout.begin()
        if self._layout.keeps_weights_whole:
            nn.functional.linear = linear
        self._masters = list(self._layout.masters())  # which stay where they are
        if (partitioned := self._partitioned) is not None:
            device = torch.device(engine.device)
            partitioned.attach(self._masters, self.shapes, replicated=self.replicated, device=device)
        self._frozen = frozen_weights(engine, self._layout)

    @property
    def replicated(self) -> bool:
        return self.zero_stage == 0

    @property
    def _partitioned(self) -> PartitionedOptimizer | None:
        """The optimizer, if it needs to know what its tensors hold."""
        return self._layout.base if isinstance(self._layout.base, PartitionedOptimizer) else None

    # ---- a step

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> None:
        self._engine.step()

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self._layout.base.param_groups:
            group["lr"] = learning_rate * group.get(RATE_SCALE, 1.0)

    def approve_updates(self, approve: Callable[[GradientNorm], bool]) -> None:
        """See TrainingEngine.

        Every ZeRO stage reduces the gradients, computes their norm, and only then calls `step` of the PyTorch
        optimizer inside it. PyTorch's hooks around that call show it no parameters if the update is not approved, and
        DeepSpeed then ends the step as always, with its buckets, partitions and counters in order.
        """
        for optimizer in self._layout.torch_optimizers():
            self._approve(optimizer, approve)

    def _approve(self, optimizer: torch.optim.Optimizer, approve: Callable[[GradientNorm], bool]) -> None:
        hidden: list[Any] = []

        def before(optimizer: Any, args: Any, kwargs: Any) -> None:
            hidden.append(optimizer.param_groups)
            if not approve(self._gradient_norm()):
                optimizer.param_groups = []

        def after(optimizer: Any, args: Any, kwargs: Any) -> None:
            optimizer.param_groups = hidden.pop()

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)

    def _gradient_norm(self) -> GradientNorm:
        """As DeepSpeed has just computed it."""
        norm = self._layout.gradient_norm
        return self._engine._global_grad_norm if norm is None else norm

    # ---- parameters

    @property
    def shapes(self) -> dict[str, list[int]]:
        return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in self._engine.module.named_parameters()}

    @property
    def frozen(self) -> frozenset[str]:
        return frozenset(name for name, p in self._engine.module.named_parameters() if not p.requires_grad)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self._engine.module.named_parameters() if p.requires_grad]

    def held_parameters(self) -> list[tuple[str, Tensor]]:
        held = []
        for name, parameter in self._engine.module.named_parameters():
            if not _sharded(parameter):
                held.append((name, parameter.data))
            elif (count := _shard_of(parameter)[1]) > 0:
                held.append((name, cast(Any, parameter).ds_tensor.narrow(0, 0, count)))
        return held

    def replicas(self) -> Iterator[Tensor]:
        for parameter in self._engine.module.parameters():
            if not _sharded(parameter) or _gathered_for_good(parameter):
                yield parameter.data
        yield from self._engine.module.buffers()

    # ---- state

    def master_weights(self) -> list[ParameterSlice]:
        learning = [part for masters in self._masters for part in masters.slices(masters.tensor)]
        return [*learning, *(frozen.slice for frozen in self._frozen if frozen.slice.values.numel())]

    def optimizer_state(self) -> dict[str, list[ParameterSlice]]:
        slices: dict[str, list[ParameterSlice]] = {}
        for masters in self._masters:
            for key, value in self._layout.state_of(masters.tensor).items():
                if _is_like(value, masters.tensor):
                    slices.setdefault(key, []).extend(masters.slices(value))
        return slices

    def optimizer_statistics(self) -> dict[str, list[ParameterSlice]]:
        slices: dict[str, list[ParameterSlice]] = {}
        if self._partitioned is not None:
            for kind, part in self._partitioned.statistic_slices():
                slices.setdefault(kind, []).append(part)
        return slices

    def optimizer_shapes(self) -> dict[str, dict[str, list[int]]]:
        shapes: dict[str, dict[str, list[int]]] = {}
        whole = self.shapes
        for masters in self._masters:
            for key, value in self._layout.state_of(masters.tensor).items():
                if _is_like(value, masters.tensor):
                    shapes.setdefault(key, {}).update({name: whole[name] for name in masters.names})
        for kind, slices in self.optimizer_statistics().items():
            shapes[kind] = {part.name: list(part.values.shape) for part in slices}
        return shapes

    def buffers(self) -> list[ParameterSlice]:
        return [ParameterSlice(name, 0, buffer.detach().view(-1)) for name, buffer in self._persistent_buffers()]

    def state_tensors(self) -> list[Tensor]:
        found = [buffer for _, buffer in self._persistent_buffers()]
        for masters in self._masters:
            state = self._layout.state_of(masters.tensor).values()
            found += [masters.tensor, *(value for value in state if _is_like(value, masters.tensor))]
        if self._partitioned is not None:
            found += [tensor for of_kind in self._partitioned.statistics.values() for tensor in of_kind.values()]
        return found

    def _persistent_buffers(self) -> Iterator[tuple[str, Tensor]]:
        for name, module, key in self._buffer_owners:
            yield name, getattr(module, key)

    @cached_property
    def _buffer_owners(self) -> list[tuple[str, nn.Module, str]]:
        """The name of each persistent buffer, the module that has it, and its name there."""
        module = self._engine.module
        kept = module.state_dict(keep_vars=True).keys()
        paths = [(name, *name.rpartition(".")[::2]) for name, _ in module.named_buffers() if name in kept]
        return [(name, module.get_submodule(path), key) for name, path, key in paths]

    def running_statistics(self) -> list[ParameterSlice]:
        names: Collection[str] = getattr(self._engine.module, "running_statistics", ())  # of models of timm
        return [part for part in self.buffers() if part.name in names]

    def scalars(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for masters in self._masters:
            for key, value in self._layout.state_of(masters.tensor).items():
                if value is not None and not _is_like(value, masters.tensor):
                    found[f"optimizer.{key}"] = float(value)
        for field, value in self._layout.loss_scaling().items():
            found[f"loss_scaler.{field}"] = float(value)
        return found

    def prepare_optimizer(self, kinds: Mapping[str, Collection[str]], scalars: dict[str, float]) -> None:
        state = self._layout.base.state
        dtypes: Mapping[str, torch.dtype] = {}
        if (partitioned := self._partitioned) is not None:
            partitioned.prepare_statistics(kinds)
            dtypes = partitioned.dtypes
            kinds = {kind: names for kind, names in kinds.items() if kind not in partitioned.statistic_kinds}
        for masters in self._masters:
            group = self._layout.group_of(masters.tensor)
            state.pop(masters.tensor, None)
            for key, names in kinds.items():
                if any(name in names for name in masters.names):
                    state[masters.tensor][key] = torch.zeros_like(masters.tensor, dtype=dtypes.get(key))
            for name, value in scalars.items():
                section, _, key = name.partition(".")
                if section == "optimizer":  # torch keeps counters on the host, except for these two kinds of kernels
                    on_device = group.get("fused") or group.get("capturable")
                    device = masters.tensor.device if on_device else torch.device("cpu")
                    state[masters.tensor][key] = torch.tensor(value, dtype=torch.float32, device=device)
        for field, value in self._layout.loss_scaling().items():
            saved = scalars.get(f"loss_scaler.{field}", value)
            setattr(self._layout.loss_scaler, field, type(value)(saved))

    @torch.no_grad()
    def publish(self) -> None:
        for frozen in self._frozen:  # before the layout, which gathers anew what ZeRO-3 keeps whole
            frozen.publish()
        self._layout.publish()

    def reset_progress(self, step: int) -> None:
        engine = self._engine
        self._layout.optimizer.zero_grad()
        self._layout.drop_gradients()
        engine.micro_steps = step * engine.gradient_accumulation_steps()
        engine.global_steps = step
        engine.global_samples = step * engine.train_batch_size()

    def close(self) -> None:
        self._engine.destroy()
        nn.functional.linear = self._linear


# ---- where DeepSpeed keeps the state


class FrozenWeight(ABC):
    """A parameter that does not learn: DeepSpeed has no master of it, but what it computes with, rounded to 16 bits.

    slice: what this process holds of it, in fp32. The whole under stage 0, which needs the whole to write; an equal
    part of it under stages 1 and 2; its shard under stage 3.
    """

    slice: ParameterSlice

    @abstractmethod
    def publish(self) -> None:
        """Copies the slice to the weight that the model computes with; collective."""


class FrozenWhole(FrozenWeight):
    """Without ZeRO."""

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self._weight = parameter.data
        self.slice = ParameterSlice(name, 0, self._weight.float().view(-1))  # itself, if it is fp32

    def publish(self) -> None:
        self._weight.view(-1).copy_(self.slice.values)


class FrozenShare(FrozenWeight):
    """Under ZeRO-1 and 2."""

    def __init__(self, name: str, parameter: nn.Parameter, device: torch.device) -> None:
        self._weight, rank, size = parameter.data, torch.distributed.get_rank(), torch.distributed.get_world_size()
        count = -(-parameter.numel() // size)
        self._padded = torch.zeros(count, dtype=torch.float32, device=device)
        start = min(rank * count, parameter.numel())
        held = self._padded[: max(0, min(count, parameter.numel() - start))]
        held.copy_(self._weight.view(-1)[start : start + len(held)])
        self.slice = ParameterSlice(name, start, held)

    def publish(self) -> None:
        share = self._padded.to(self._weight.device)
        whole = share.new_empty(len(share) * torch.distributed.get_world_size())
        torch.distributed.all_gather_into_tensor(whole, share)
        self._weight.view(-1).copy_(whole[: self._weight.numel()])


class FrozenShard(FrozenWeight):
    """Under ZeRO-3."""

    def __init__(self, name: str, parameter: nn.Parameter, device: torch.device) -> None:
        start, count = _shard_of(parameter)
        self._shard = cast(Any, parameter).ds_tensor.narrow(0, 0, count)
        held = torch.empty(count, dtype=torch.float32, device=device).copy_(self._shard)
        self.slice = ParameterSlice(name, min(start, cast(Any, parameter).ds_numel), held)

    def publish(self) -> None:
        self._shard.copy_(self.slice.values)


def frozen_weights(engine: Any, layout: "Layout") -> list[FrozenWeight]:
    """What does not learn, on the device that the masters of all else are on."""
    frozen: list[FrozenWeight] = []
    device = next(iter(layout.masters())).tensor.device
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            continue
        if _sharded(parameter):
            frozen.append(FrozenShard(name, parameter, device))
        elif engine.zero_optimization_stage() == 0:
            frozen.append(FrozenWhole(name, parameter))
        else:
            frozen.append(FrozenShare(name, parameter, device))
    return frozen


class Layout(ABC):
    """Where one of DeepSpeed's optimizers keeps its state."""

    title: ClassVar[str]
    internals: ClassVar[tuple[str, ...]]  # what `self.optimizer` must have
    only_reduces: ClassVar[bool] = True  # what follows a backward pass; ZeRO's stages also partition there

    keeps_weights_whole: bool = True  # PyTorch's `linear` may save a weight for the backward pass

    def __init__(self, engine: Any) -> None:
        self.engine, self.optimizer = engine, engine.optimizer
        self.names = {id(parameter): name for name, parameter in engine.module.named_parameters()}

    @abstractmethod
    def masters(self) -> Iterator[Partition]:
        """The fp32 master weights that this process updates."""

    @abstractmethod
    def publish(self) -> None:
        """Copies the master weights to the weights that the model computes with; collective."""

    def begin(self) -> None:  # noqa: B027 - most begin with the weights as they are
        """Undoes what making the optimizer has changed, and shortens its ways."""

    def drop_gradients(self) -> None:  # noqa: B027 - `zero_grad` is enough for some
        """Drops what of an unfinished step `zero_grad` leaves."""

    @property
    def base(self) -> Any:
        """The PyTorch optimizer that does the update."""
        return self.optimizer.optimizer

    @property
    def gradient_norm(self) -> GradientNorm | None:
        """Of the step whose update is about to happen; None if it is with the engine."""
        return self.optimizer._global_grad_norm

    @property
    def loss_scaler(self) -> Any:
        return self.optimizer.loss_scaler

    @property
    def on_nvme(self) -> bool:
        return False

    def torch_optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.engine.basic_optimizer]

    def loss_scaling(self) -> dict[str, Any]:
        """What the loss scaler adapts; nothing but in fp16."""
        fields = vars(self.loss_scaler) if self.engine.fp16_enabled() else {}
        return {field: fields[field] for field in SCALER_INTERNALS if fields.get(field) is not None}

    def state_of(self, master: Tensor) -> dict[str, Any]:
        return self.base.state.get(master, {})

    def group_of(self, master: Tensor) -> dict[str, Any]:
        """The settings of the optimizer's group; ZeRO-3 empties the groups' lists, but they share these settings."""
        groups = self.base.param_groups
        return next((g for g in groups if any(p is master for p in g["params"])), groups[0])

    def _partition(self, group: Sequence[nn.Parameter], offsets: Iterable[int], number: int, flat: Tensor) -> Partition:
        """This rank's equal part `flat` of a group of parameters, which begin at `offsets` of the flattened group."""
        rank, size, spans = torch.distributed.get_rank(self.optimizer.real_dp_process_group[number]), flat.numel(), []
        for parameter, offset in zip(group, offsets, strict=True):
            first, last = max(offset, rank * size), min(offset + parameter.numel(), (rank + 1) * size)
            if first < last:
                spans.append(Span(self.names[id(parameter)], first - offset, first - rank * size, last - first))
        return Partition(flat, spans, [self.names[id(parameter)] for parameter in group])

    def _whole(self, parameter: nn.Parameter, master: Tensor) -> Partition:
        name = self.names[id(parameter)]
        return Partition(master, [Span(name, 0, 0, master.numel())], [name])


class Plain(Layout):
    """fp32 without ZeRO: the PyTorch optimizer itself, whose masters are the model's parameters."""

    title = "optimizer for fp32 without ZeRO"
    internals = ("param_groups", "state", "zero_grad")

    @property
    def base(self) -> Any:
        return self.optimizer

    @property
    def gradient_norm(self) -> None:
        return None

    def masters(self) -> Iterator[Partition]:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                yield self._whole(parameter, parameter)

    def publish(self) -> None:
        """Nothing to do: the weights are the masters."""


class Unpartitioned16Bit(Layout):
    """FP16_UnfusedOptimizer, which also does bf16 without ZeRO: an fp32 master beside each parameter."""

    title = "optimizer for 16-bit training without ZeRO"
    internals = ("_global_grad_norm", "fp16_groups", "fp32_groups", "loss_scale_config", "optimizer", "zero_grad")

    @property
    def loss_scaler(self) -> Any:
        return self.optimizer.loss_scale_config

    def masters(self) -> Iterator[Partition]:
        for parameter, master in self._pairs():
            yield self._whole(parameter, master)

    @torch.no_grad()
    def begin(self) -> None:
        """DeepSpeed makes one step with gradients of zero, which decays the weights and counts as the first."""
        self.base.state.clear()
        for parameter, master in self._pairs():
            master.copy_(parameter)

    def publish(self) -> None:
        for parameter, master in self._pairs():
            parameter.data.copy_(master.data)

    def _pairs(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for parameters, masters in zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True):
            yield from zip(parameters, masters, strict=True)


class Zero1And2(Layout):
    """DeepSpeedZeroOptimizer: each rank's part of a flattened group."""

    title = "optimizer for ZeRO-1 and ZeRO-2"
    only_reduces = False
    internals = (
        "_global_grad_norm",
        "_release_preflattened_grad_buffers",
        "all_grad_tensors",
        "averaged_gradients",
        "cpu_offload",
        "loss_scaler",
        "micro_step_id",
        "optimizer",
        "real_dp_process_group",
        "reset_cpu_buffers",
        "round_robin_bit16_groups",
        "round_robin_bit16_offsets",
        "single_partition_of_fp32_groups",
        "update_lp_params",
        "zero_grad",
        *ZERO_1_AND_2_INTERNALS,
    )
    shorter: ShorterWay | None = None

    def begin(self) -> None:
        self.shorter = shorten_zero_1_and_2(self.optimizer)

    def masters(self) -> Iterator[Partition]:
        optimizer = self.optimizer
        for number, flat in enumerate(optimizer.single_partition_of_fp32_groups):
            offsets = optimizer.round_robin_bit16_offsets[number]
            yield self._partition(optimizer.round_robin_bit16_groups[number], offsets, number, flat)

    def publish(self) -> None:
        self.optimizer.update_lp_params()

    def drop_gradients(self) -> None:
        """What DeepSpeed's own `step` does at its start and after an overflow."""
        optimizer = self.optimizer
        optimizer.micro_step_id = -1
        optimizer._release_preflattened_grad_buffers()
        for group in optimizer.averaged_gradients:  # in place: the parameters refer to this dictionary
            optimizer.averaged_gradients[group] = None
            optimizer.all_grad_tensors[group] = None
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
            optimizer._offload_accumulated_param_ids = set()
        if self.shorter is not None:
            self.shorter.drop()


class Zero1Bf16(Layout):
    """BF16_Optimizer, which is ZeRO-1 with fp32 gradients: each rank's part of a flattened group."""

    title = "optimizer for ZeRO-1 in bf16"
    internals = (  # without `_global_grad_norm`, which the first step adds
        "bf16_groups",
        "clear_hp_grads",
        "fp32_groups_flat_partition",
        "optimizer",
        "real_dp_process_group",
        "update_lp_params",
        "zero_grad",
    )

    def masters(self) -> Iterator[Partition]:
        for number, flat in enumerate(self.optimizer.fp32_groups_flat_partition):
            group, offsets = self.optimizer.bf16_groups[number], [0]
            for parameter in group:
                offsets.append(offsets[-1] + parameter.numel())
            yield self._partition(group, offsets[:-1], number, flat)

    def publish(self) -> None:
        self.optimizer.update_lp_params()

    def drop_gradients(self) -> None:
        self.optimizer.clear_hp_grads()


class Zero3(Layout):
    """DeepSpeedZeroOptimizer_Stage3: the rank's part of each parameter, one after the other."""

    title = "optimizer for ZeRO-3"
    only_reduces = False
    internals = (
        "_global_grad_norm",
        "_overflow_clean_up",
        "_partition_all_parameters",
        "_reassign_or_swap_out_partitioned_parameters",
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "invalidate_secondary_tensor",
        "leaf_parameters",
        "loss_scaler",
        "optimizer",
        "params_in_nvme_and_cpu",
        "persistent_parameters",
        "swap_optimizer",
        "zero_grad",
        *ZERO_3_INTERNALS,
    )
    shorter: ShorterWay | None = None

    def begin(self) -> None:
        self.shorter = shorten_zero_3(self.optimizer)
        self.keeps_weights_whole = self.shorter is not None

    @property
    def on_nvme(self) -> bool:
        return bool(self.optimizer.swap_optimizer or self.optimizer.params_in_nvme_and_cpu)

    def torch_optimizers(self) -> list[torch.optim.Optimizer]:
        """Twin-Flow offloading has a second optimizer, for the part of the state that stays on the GPU."""
        second = getattr(self.optimizer, "backup_optimizer", None)
        return [*super().torch_optimizers(), *([second] if second is not None else [])]

    def masters(self) -> Iterator[Partition]:
        optimizer = self.optimizer
        for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
            yield Partition(flat, list(self._spans(group)), [self.names[id(parameter)] for parameter in group])

    def _spans(self, group: Sequence[Any]) -> Iterator[Span]:
        offset = 0
        for parameter in group:
            start, count = _shard_of(parameter)
            if count > 0:
                yield Span(self.names[id(parameter)], start, offset, count)
            offset += parameter.ds_tensor.ds_numel

    def publish(self) -> None:
        optimizer = self.optimizer
        optimizer._partition_all_parameters()  # small parameters stay gathered between steps: those are stale now
        for sub_group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()

    def drop_gradients(self) -> None:
        self.optimizer._overflow_clean_up(None)
        if self.shorter is not None:
            self.shorter.drop()


def layout_of(engine: Any) -> Layout:
    """The layout of an engine, by its ZeRO stage and the class of its optimizer."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        return Zero3(engine)
    if type(optimizer).__name__ == "BF16_Optimizer":
        return Zero1Bf16(engine)
    if stage > 0:
        return Zero1And2(engine)
    return Plain(engine) if optimizer is engine.basic_optimizer else Unpartitioned16Bit(engine)


def missing_internals(engine: Any, layout: Layout) -> list[str]:
    """What this module uses and this DeepSpeed lacks, each in words."""
    missing = [f"'{name}' in its engine" for name in ENGINE_INTERNALS if not hasattr(engine, name)]
    missing += [f"'{name}' in its {layout.title}" for name in layout.internals if not hasattr(layout.optimizer, name)]
    if isinstance(layout, Zero3):
        parameter = next(engine.module.parameters())
        missing += [f"'{name}' in ZeRO-3's parameters" for name in PARAMETER_INTERNALS if not hasattr(parameter, name)]
        if not missing and layout.optimizer.leaf_parameters:
            missing.append("'z3_leaf_parameter' in its runtime/zero/stage3.py")
    elif engine.fp16_enabled() and not layout.loss_scaling():
        missing.append(f"{' or '.join(SCALER_INTERNALS)} in its loss scaler")
    return missing


def _sharded(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_tensor")


def _shard_of(parameter: Any) -> tuple[int, int]:
    """(first element, number of elements) that this process holds of a flattened parameter.

    Shards have the same size on all ranks. The last ones end in padding, or are nothing else: memory that DeepSpeed
    never writes to, where anything may be found.
    """
    size = parameter.ds_tensor.ds_numel
    start = torch.distributed.get_rank(parameter.ds_process_group) * size
    return start, max(0, min(size, parameter.ds_numel - start))


def _gathered_for_good(parameter: Any) -> bool:
    """Whether ZeRO-3 keeps this parameter whole on every process, and has it there now."""
    return bool(parameter.ds_persist and parameter.ds_status.name == "AVAILABLE")


def _is_like(value: Any, master: Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == master.shape and value.ndim > 0


def _keep_fp32_gradient_norm(engine: Any) -> None:
    """Plain fp32 training without ZeRO clips through this method, which throws the norm away: keep it instead."""
    parameters = list(engine.module.parameters())

    def clip_fp32_gradients() -> None:
        engine._global_grad_norm = nn.utils.clip_grad_norm_(parameters, engine.gradient_clipping())

    engine.clip_fp32_gradients = clip_fp32_gradients


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _is_no_leaf(parameter: nn.Parameter) -> bool:
    return False


def _leave_as_it_is() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """In place of `deepspeed.runtime.compiler.compile`, which makes a decorator."""
    return lambda function: function


def _version() -> str:
    return str(import_deepspeed().__version__)
