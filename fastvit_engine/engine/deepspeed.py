"""The trained state inside a DeepSpeed engine, in a form that knows neither ZeRO stage nor number of processes.

DeepSpeed keeps the fp32 master weights and the optimizer's moments in flat buffers, cut by rules that differ between
its stages and precisions. Here they are *pieces*: stretches of flattened parameters, called by the parameter's name.
Reading a piece reads the engine's memory, and writing into one changes the engine. This is the one module that knows
where DeepSpeed keeps what (seen in version 0.19.8).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastvit_engine.errors import UserError

# What a loss scaler adapts while it trains in fp16; its other fields are settings.
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + len(values)) of the flattened parameter or buffer `name`; `values` is a 1-D view."""

    name: str
    start: int
    values: Tensor

    @property
    def stop(self) -> int:
        return self.start + self.values.numel()


@dataclass(frozen=True)
class _FlatMasters:
    """A tensor of fp32 masters that the optimizer updates, and the stretches of parameters that lie in it."""

    tensor: Tensor
    stretches: list[tuple[str, int, int, int]]  # parameter, start in it, place in the tensor, elements

    def pieces(self, values: Tensor) -> list[Piece]:
        """The stretches of a tensor laid out like the masters."""
        flat = values.detach().view(-1)
        return [Piece(name, start, flat.narrow(0, place, count)) for name, start, place, count in self.stretches]


class EngineState:
    """Master weights, optimizer state and buffers of a DeepSpeed engine.

    `replicated` is True where every process holds all of them (ZeRO-0); otherwise each parameter's elements are
    divided over the processes without overlap. UserError for an engine whose state lies on NVMe.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.module: nn.Module = engine.module
        self._names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        self.replicated = engine.zero_optimization_stage() == 0
        optimizer = engine.optimizer
        if getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False):
            raise UserError("checkpoints of state that DeepSpeed keeps on NVMe are not supported: offload to cpu")

    @property
    def shapes(self) -> dict[str, list[int]]:
        """The whole shape of each parameter, however it is sharded."""
        return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in self.module.named_parameters()}

    def master_weights(self) -> list[Piece]:
        """The fp32 masters that this process holds, as views."""
        return [piece for masters in self._masters() for piece in masters.pieces(masters.tensor)]

    def optimizer_state(self) -> dict[str, list[Piece]]:
        """The optimizer's tensors (for Adam exp_avg and exp_avg_sq), as views; empty before the first step."""
        pieces: dict[str, list[Piece]] = {}
        for masters in self._masters():
            for key, value in self._state_of(masters.tensor).items():
                if _is_like(value, masters.tensor):
                    pieces.setdefault(key, []).extend(masters.pieces(value))
        return pieces

    def buffers(self) -> list[Piece]:
        """The module's persistent buffers, which every process holds whole."""
        kept = self.module.state_dict(keep_vars=True).keys()
        return [Piece(name, 0, b.detach().view(-1)) for name, b in self.module.named_buffers() if name in kept]

    def scalars(self) -> dict[str, float]:
        """The optimizer's counters and the loss scale: the same on all processes."""
        found: dict[str, float] = {}
        for masters in self._masters():
            for key, value in self._state_of(masters.tensor).items():
                if not _is_like(value, masters.tensor):
                    found[f"optimizer.{key}"] = float(value)
        for field, value in self._loss_scaling().items():
            found[f"loss_scaler.{field}"] = float(value)
        return found

    def prepare_optimizer(self, keys: Iterable[str], scalars: dict[str, float]) -> None:
        """Gives the optimizer exactly these tensors, of zeros that the caller is to overwrite, and these counters."""
        for masters in self._masters():
            group = self._group_of(masters.tensor)
            state = self._base_optimizer().state
            state.pop(masters.tensor, None)
            for key in keys:
                state[masters.tensor][key] = torch.zeros_like(masters.tensor)
            for name, value in scalars.items():
                section, _, key = name.partition(".")
                if section == "optimizer":  # torch keeps counters on the host, except for these two kinds of kernels
                    on_device = group.get("fused") or group.get("capturable")
                    device = masters.tensor.device if on_device else torch.device("cpu")
                    state[masters.tensor][key] = torch.tensor(value, dtype=torch.float32, device=device)
        for field, value in self._loss_scaling().items():
            saved = scalars.get(f"loss_scaler.{field}", value)
            setattr(self._loss_scaler(), field, type(value)(saved))

    @torch.no_grad()
    def publish(self) -> None:
        """Makes the weights that the model computes with equal to the masters; collective."""
        optimizer = self.engine.optimizer
        if self.engine.zero_optimization_stage() == 3:
            optimizer._partition_all_parameters()  # small parameters stay gathered between steps: those are stale now
            for sub_group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
            optimizer.invalidate_secondary_tensor()
        elif hasattr(optimizer, "update_lp_params"):  # ZeRO-1 and 2
            optimizer.update_lp_params()
        else:  # without ZeRO: nothing to do in fp32, where the weights are the masters
            for parameter, master in self._pairs_without_zero():
                if master is not parameter:
                    parameter.data.copy_(master.data)

    def reset_progress(self, step: int) -> None:
        """Drops gradients of a step that was not finished, and tells DeepSpeed how many optimizer steps are done."""
        engine, optimizer = self.engine, self.engine.optimizer
        optimizer.zero_grad()
        if engine.zero_optimization_stage() == 3:
            optimizer._overflow_clean_up(None)
        elif hasattr(optimizer, "clear_hp_grads"):  # BF16_Optimizer
            optimizer.clear_hp_grads()
        elif engine.zero_optimization_stage() > 0:  # what its step() does at its start and after an overflow
            optimizer.micro_step_id = -1
            optimizer._release_preflattened_grad_buffers()
            for group in optimizer.averaged_gradients:  # in place: the parameters refer to this dictionary
                optimizer.averaged_gradients[group] = None
                optimizer.all_grad_tensors[group] = None
            if optimizer.cpu_offload:
                optimizer.reset_cpu_buffers()
                optimizer._offload_accumulated_param_ids = set()
        engine.micro_steps = step * engine.gradient_accumulation_steps()
        engine.global_steps = step
        engine.global_samples = step * engine.train_batch_size()

    # ---- where DeepSpeed keeps it

    def _masters(self) -> Iterator[_FlatMasters]:
        optimizer = self.engine.optimizer
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3: the rank's part of each parameter, in a row
            for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
                yield _FlatMasters(flat, list(self._parts_of_parameters(group)))
        elif hasattr(optimizer, "single_partition_of_fp32_groups"):  # ZeRO-1 and 2: the rank's part of a whole group
            for number, flat in enumerate(optimizer.single_partition_of_fp32_groups):
                group, offsets = optimizer.round_robin_bit16_groups[number], optimizer.round_robin_bit16_offsets[number]
                rank = torch.distributed.get_rank(optimizer.real_dp_process_group[number])
                yield _FlatMasters(flat, list(self._part_of_group(group, offsets, rank, flat.numel())))
        elif hasattr(optimizer, "fp32_groups_flat_partition"):  # BF16_Optimizer, which is ZeRO-1 with fp32 gradients
            for number, flat in enumerate(optimizer.fp32_groups_flat_partition):
                group, offsets = optimizer.bf16_groups[number], [0]
                for parameter in group:
                    offsets.append(offsets[-1] + parameter.numel())
                rank = torch.distributed.get_rank(optimizer.real_dp_process_group[number])
                yield _FlatMasters(flat, list(self._part_of_group(group, offsets[:-1], rank, flat.numel())))
        else:
            for parameter, master in self._pairs_without_zero():
                name = self._names[id(parameter)]
                yield _FlatMasters(master, [(name, 0, 0, master.numel())])

    def _pairs_without_zero(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter and its fp32 master, which in fp32 is itself."""
        optimizer = self.engine.optimizer
        if hasattr(optimizer, "fp32_groups"):
            for parameters, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                yield from zip(parameters, masters, strict=True)
        else:
            for group in optimizer.param_groups:
                yield from ((parameter, parameter) for parameter in group["params"])

    def _parts_of_parameters(self, group: Sequence[nn.Parameter]) -> Iterator[tuple[str, int, int, int]]:
        place = 0
        for parameter in cast(Sequence[Any], group):
            part = parameter.ds_tensor.ds_numel  # the same on all ranks; the last ones' may be padding
            start = torch.distributed.get_rank(parameter.ds_process_group) * part
            count = min(part, parameter.ds_numel - start)
            if count > 0:
                yield self._names[id(parameter)], start, place, count
            place += part

    def _part_of_group(
        self, group: Sequence[nn.Parameter], offsets: Sequence[int], rank: int, size: int
    ) -> Iterator[tuple[str, int, int, int]]:
        """What of the parameters, which begin at `offsets` of a line, lies in its elements [rank, rank + 1) * size."""
        for parameter, offset in zip(group, offsets, strict=True):
            first, last = max(offset, rank * size), min(offset + parameter.numel(), (rank + 1) * size)
            if first < last:
                yield self._names[id(parameter)], first - offset, first - rank * size, last - first

    def _base_optimizer(self) -> Any:
        return getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)

    def _state_of(self, master: Tensor) -> dict[str, Any]:
        return self._base_optimizer().state.get(master, {})

    def _group_of(self, master: Tensor) -> dict[str, Any]:
        """The settings of the optimizer's group; ZeRO-3 empties the groups' lists, but they share these settings."""
        groups = self._base_optimizer().param_groups
        return next((g for g in groups if any(p is master for p in g["params"])), groups[0])

    def _loss_scaling(self) -> dict[str, Any]:
        """What the loss scaler adapts; nothing but in fp16."""
        fields = vars(self._loss_scaler()) if self.engine.fp16_enabled() else {}
        return {field: fields[field] for field in _SCALER_FIELDS if fields.get(field) is not None}

    def _loss_scaler(self) -> Any:
        optimizer = self.engine.optimizer
        return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)


def share(pieces: Sequence[Piece], rank: int, size: int) -> list[Piece]:
    """The `rank`-th of `size` equal contiguous shares of the line that the pieces form end to end."""
    total = sum(piece.values.numel() for piece in pieces)
    first, last = total * rank // size, total * (rank + 1) // size
    shared, place = [], 0
    for piece in pieces:
        skip, stop = max(0, first - place), min(piece.values.numel(), last - place)
        if skip < stop:
            shared.append(Piece(piece.name, piece.start + skip, piece.values[skip:stop]))
        place += piece.values.numel()
    return shared


def _is_like(value: Any, master: Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == master.shape and value.ndim > 0
