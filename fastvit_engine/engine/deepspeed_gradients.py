"""Shorter ways for gradients through DeepSpeed's ZeRO optimizers, on CPUs (written for version 0.19.8).

ZeRO-1 and ZeRO-2 copy a gradient four to six times on its way to the optimizer: to a bucket, to a flattened bucket,
back, to the partition, and to a flat tensor. ZeRO-3 does the same, and looks after parameters that one process always
has. A CPU does all this with the core that computes. The classes below replace methods of one DeepSpeed optimizer. What
is sent between processes, in which order and in which type, stays the same, but for zeros in the place of gradients
that a step lacks. So do DeepSpeed's clipping, overflow checks and update.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# What is used of DeepSpeedZeroOptimizer, beside what its layout lists.
ZERO_1_AND_2_INTERNALS = (
    "_update_model_bit16_weights",
    "communication_data_type",
    "contiguous_gradients",
    "dp_process_group",
    "dtype",
    "get_grad_norm_direct",
    "gradient_accumulation_dtype",
    "gradient_predivide_factor",
    "is_gradient_accumulation_boundary",
    "overlap_comm",
    "overlapping_partition_gradients_reduce_epilogue",
    "partition_gradients",
    "partition_size",
    "postscale_gradients",
    "process_gradients",
    "reduce_bucket_size",
    "reduce_gradients",
    "reduce_scatter",
    "use_grad_accum_attribute",
    "use_multi_rank_bucket_allreduce",
)
# The same of DeepSpeedZeroOptimizer_Stage3.
ZERO_3_INTERNALS = (
    "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition",
    "dp_process_group",
    "flatten",
    "get_grad_norm_direct",
    "independent_gradient_partition_epilogue",
    "is_gradient_accumulation_boundary",
    "offload_optimizer",
    "offload_param",
    "overlapping_partition_gradients_reduce_epilogue",
    "parameter_offload",
    "reduce_ready_partitions_and_remove_grads",
)
_ROW = 4096


class ShorterWay(Protocol):
    """What replaces methods of an optimizer."""

    def drop(self) -> None:
        """Forgets the gradients of an unfinished step."""


def shorten_zero_1_and_2(optimizer: Any) -> ShorterWay | None:
    """Replaces how a DeepSpeedZeroOptimizer collects gradients; None if it stays as it is.

    It does on GPUs, with offloading, and with settings that ask for another way: another type to send gradients in, or
    another choice for `overlap_comm`, `contiguous_gradients`, `reduce_scatter`, `use_multi_rank_bucket_allreduce`,
    `prescale_gradients` or `gradient_predivide_factor` than DeepSpeed's own.
    """
    as_usual = (
        optimizer.contiguous_gradients
        and optimizer.reduce_scatter
        and optimizer.postscale_gradients
        and optimizer.use_multi_rank_bucket_allreduce
        and optimizer.gradient_predivide_factor == 1.0
        and optimizer.communication_data_type == optimizer.dtype
        and not optimizer.overlap_comm
        and not optimizer.use_grad_accum_attribute  # stage 1 in 16 bits
        and not optimizer.cpu_offload
    )
    if not as_usual or optimizer.single_partition_of_fp32_groups[0].device.type != "cpu":
        return None
    optimizer.get_grad_norm_direct = _Norm(optimizer.dp_process_group, _flat_of, torch.float32)
    if optimizer.partition_gradients and torch.distributed.get_world_size(optimizer.dp_process_group) > 1:
        return PartitionedGradients(optimizer)
    return WholeGradients(optimizer)


def shorten_zero_3(optimizer: Any) -> ShorterWay | None:
    """The same for a DeepSpeedZeroOptimizer_Stage3; None on GPUs, with offloading, and on several processes.

    On several processes, gradients go DeepSpeed's way, but for the last copy of each process's share.
    """
    if optimizer.offload_optimizer or optimizer.offload_param or _device(optimizer).type != "cpu":
        return None
    optimizer.flatten = _Flattened(optimizer.flatten)
    optimizer.get_grad_norm_direct = _Norm(optimizer.dp_process_group, optimizer.flatten, torch.float64)
    if torch.distributed.get_world_size(optimizer.dp_process_group) > 1:
        return None
    return UnshardedZero3(optimizer)


def _device(optimizer: Any) -> torch.device:
    device: torch.device = optimizer.fp32_partitioned_groups_flat[0].device
    return device


class Gradients(list[Tensor]):
    """What DeepSpeed takes the norm of, and the flat tensor that they are views of, which it gives the optimizer."""

    def __init__(self, parts: Sequence[Tensor], flat: Tensor) -> None:
        super().__init__(parts or [flat])
        self.flat_partition = flat


@dataclass
class _Place:
    """Where a parameter is: elements [start, start + numel) of its flattened group of parameters."""

    parameter: nn.Parameter
    group: int
    start: int
    owned: int  # elements of the group that one process updates

    @property
    def stop(self) -> int:
        return self.start + self.parameter.numel()

    def share(self, rank: int) -> tuple[int, int]:
        """The part of the group's elements [first, last) that is this parameter's and process `rank` updates."""
        return max(self.start, rank * self.owned), min(self.stop, (rank + 1) * self.owned)

    def cuts(self, most: int) -> Iterator[tuple[int, int]]:
        """The parameter's elements [first, last) that are reduced at a time, if it is larger than a bucket.

        It is cut only where its owner changes.
        """
        borders = [*range((self.start // self.owned + 1) * self.owned, self.stop, self.owned), self.stop]
        first = self.start
        for border in borders:
            if border - first > most or border == self.stop:
                yield first - self.start, border - self.start
                first = border


class _Gradients:
    """What both ways have in common: where parameters are, and which gradients of this step are there."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.group = optimizer, optimizer.dp_process_group
        self.size = torch.distributed.get_world_size(self.group)
        self.rank = torch.distributed.get_rank(self.group)
        self.places = [
            _Place(parameter, number, start, optimizer.partition_size[number])
            for number, group in enumerate(optimizer.round_robin_bit16_groups)
            for parameter, start in zip(group, optimizer.round_robin_bit16_offsets[number], strict=True)
        ]
        self.place_of = {place.parameter: place for place in self.places}
        self.there: set[nn.Parameter] = set()  # whose gradient of this step has come
        self._all_reduce = importlib.import_module("deepspeed.comm").all_reduce
        optimizer.process_gradients = self.collect
        optimizer._update_model_bit16_weights = _unchanged

    def collect(self, parameter: nn.Parameter, group: int) -> None:
        """Takes the gradient of a parameter, as soon as a backward pass has it."""
        raise NotImplementedError

    def drop(self) -> None:
        self.there.clear()

    def average(self, gradients: Tensor) -> None:
        """Over the processes, in place."""
        if self.size > 1:
            gradients.div_(self.size)
            self._all_reduce(gradients, group=self.group)


class WholeGradients(_Gradients):
    """Stage 1, and stage 2 on one process: all gradients in one tensor, where they are summed up and reduced."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        sizes = [size * self.size for size in optimizer.partition_size]
        whole = torch.zeros(sum(sizes), dtype=optimizer.gradient_accumulation_dtype)
        groups = whole.split(sizes)
        self.views = {
            place.parameter: groups[place.group][place.start : place.stop].view_as(place.parameter)
            for place in self.places
        }
        begins = [sum(sizes[:number]) for number in range(len(sizes))]
        self.messages = [
            whole[begins[first.group] + first.start + start : begins[last.group] + last.start + stop]
            for first, last, start, stop in self._messages(optimizer.reduce_bucket_size)
        ]
        self.own = []
        for number, (group, owned) in enumerate(zip(groups, optimizer.partition_size, strict=True)):
            shares = [place.share(self.rank) for place in self.places if place.group == number]
            parts = [group[first:last] for first, last in shares if first < last]
            self.own.append((parts, group[self.rank * owned : (self.rank + 1) * owned]))
        optimizer.reduce_gradients = self.reduce
        optimizer.overlapping_partition_gradients_reduce_epilogue = self.reduce

    def _messages(self, most: int) -> Iterator[tuple[_Place, _Place, int, int]]:
        """DeepSpeed's buckets: the first parameter of each, the last, and where it begins and ends in these."""
        bucket: list[_Place] = []
        filled = 0
        for place in self.places:
            if bucket and filled + place.parameter.numel() > most:
                yield from self._messages_of(bucket, most)
                bucket, filled = [], 0
            bucket.append(place)
            filled += place.parameter.numel()
        yield from self._messages_of(bucket, most)

    def _messages_of(self, bucket: Sequence[_Place], most: int) -> Iterator[tuple[_Place, _Place, int, int]]:
        first, last = bucket[0], bucket[-1]
        if first.parameter.numel() <= most:
            yield first, last, 0, last.parameter.numel()
        else:
            yield from ((first, first, start, stop) for start, stop in first.cuts(most))

    def collect(self, parameter: nn.Parameter, group: int) -> None:
        _add_gradient(self.views[parameter], parameter, self.there)

    def reduce(self, pipeline_parallel: bool = False) -> None:
        """After the last backward pass of a step; DeepSpeed's stage 2 calls it after each."""
        if not self.optimizer.is_gradient_accumulation_boundary():
            return
        _zero_all_but(self.there, self.views)
        for message in self.messages:
            self.average(message)
        for number, (parts, flat) in enumerate(self.own):
            self.optimizer.averaged_gradients[number] = Gradients(parts, flat)
        self.there.clear()


@dataclass
class _Share:
    """Of a gradient, the elements [start, start + len(sum)) that this process updates."""

    start: int
    sum: Tensor


class PartitionedGradients(_Gradients):
    """Stage 2 on several processes: each backward pass is reduced bucket by bucket, and a process keeps its share."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        dtype = optimizer.gradient_accumulation_dtype
        self.flat = [torch.zeros(owned, dtype=dtype) for owned in optimizer.partition_size]
        self.shares: dict[nn.Parameter, _Share] = {}
        for place in self.places:
            first, last = place.share(self.rank)
            if first < last:
                begin = self.rank * place.owned
                held = self.flat[place.group][first - begin : last - begin]
                self.shares[place.parameter] = _Share(first - place.start, held)
        self.parts: list[list[Tensor]] = [[] for _ in self.flat]
        for parameter, share in self.shares.items():
            self.parts[self.place_of[parameter].group].append(share.sum)
        whole = sum(place.parameter.numel() for place in self.places)
        self.bucket = torch.empty(min(optimizer.reduce_bucket_size, whole), dtype=optimizer.dtype)
        self.waiting: list[tuple[nn.Parameter, int]] = []  # what is in the bucket, and where it begins there
        self.filled = 0
        optimizer.overlapping_partition_gradients_reduce_epilogue = self.end_of_pass

    def collect(self, parameter: nn.Parameter, group: int) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        parameter.grad = None
        count = gradient.numel()
        if self.filled + count > len(self.bucket):
            self.flush()
        if count > len(self.bucket):
            gradient = gradient.reshape(-1)
            for first, last in self.place_of[parameter].cuts(len(self.bucket)):
                self.average(gradient[first:last])
            self._keep(parameter, gradient)
        else:
            self.bucket[self.filled : self.filled + count].view_as(gradient).copy_(gradient)
            self.waiting.append((parameter, self.filled))
            self.filled += count

    def flush(self) -> None:
        """Reduces what is in the bucket."""
        if self.waiting:
            self.average(self.bucket[: self.filled])
        for parameter, first in self.waiting:
            self._keep(parameter, self.bucket[first : first + parameter.numel()])
        self.waiting.clear()
        self.filled = 0

    def _keep(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        share = self.shares.get(parameter)
        if share is None:
            return
        part = gradient[share.start : share.start + len(share.sum)]
        if parameter in self.there:
            share.sum.add_(part)
        else:
            share.sum.copy_(part)
            self.there.add(parameter)

    def end_of_pass(self) -> None:
        self.flush()
        if not self.optimizer.is_gradient_accumulation_boundary():
            return
        _zero_all_but(self.there, {parameter: share.sum for parameter, share in self.shares.items()})
        for number, flat in enumerate(self.flat):
            self.optimizer.averaged_gradients[number] = Gradients(self.parts[number], flat)
        self.there.clear()

    def drop(self) -> None:
        super().drop()
        self.waiting.clear()
        self.filled = 0


class UnshardedZero3:
    """Stage 3 on one process, whose shards are whole: nothing is gathered before a module, or released after it.

    This also mends a fault: DeepSpeed updates a parameter without a gradient in this step by its last one.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        partitions = optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        learning = [parameter for group in optimizer.fp16_groups for parameter in group]
        self.views = {parameter: partitions[parameter.ds_id].view(parameter.ds_shape) for parameter in learning}
        self.there: set[nn.Parameter] = set()
        offload = optimizer.parameter_offload
        offload._remove_module_hooks()
        parameters: list[Any] = list(offload.module.parameters())
        parameters[0].all_gather(parameters)  # makes them views of their shards, which updates write to
        optimizer._partition_all_parameters = _nothing
        optimizer.persistent_parameters = []
        optimizer.reduce_ready_partitions_and_remove_grads = self.collect
        optimizer.overlapping_partition_gradients_reduce_epilogue = self.end_of_pass

    def collect(self, parameter: nn.Parameter) -> None:
        _add_gradient(self.views[parameter], parameter, self.there)

    def end_of_pass(self) -> None:
        if self.optimizer.is_gradient_accumulation_boundary():
            _zero_all_but(self.there, self.views)
            self.optimizer.independent_gradient_partition_epilogue()  # hands the gradients over
            self.there.clear()

    def drop(self) -> None:
        self.there.clear()


class _Norm:
    """In place of a norm of each gradient, converted to fp64: that of the flat tensor, in one pass, as exact.

    sent_as: the type of the sum of squares that processes add up.
    """

    def __init__(self, group: Any, flatten: Callable[[Any], Tensor], sent_as: torch.dtype) -> None:
        self._group, self._flatten, self._sent_as = group, flatten, sent_as
        self._communication = importlib.import_module("deepspeed.comm")

    def __call__(self, gradients: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
        """The norm over all processes of a group of parameters; not finite if a gradient is not."""
        total = sum_of_squares(self._flatten(gradients)).to(self._sent_as)
        if torch.distributed.get_world_size(self._group) > 1:
            self._communication.all_reduce(total, group=self._group)
        return total.sqrt()


def sum_of_squares(values: Tensor) -> Tensor:
    """Of a vector, in fp64: added up in fp32 within rows, few enough to lose nothing, and of those in fp64."""
    whole = values.numel() // _ROW * _ROW
    norms = torch.linalg.vector_norm(values[:whole].view(-1, _ROW), dim=1, dtype=torch.float32)
    rest = torch.linalg.vector_norm(values[whole:], dtype=torch.float32)
    return norms.double().square().sum() + rest.double().square()


def _flat_of(gradients: "Gradients") -> Tensor:
    return gradients.flat_partition


class _Flattened:
    """In place of a copy of tensors, end to end: a view of them, if they are that already."""

    def __init__(self, copy: Any) -> None:
        self._copy = copy

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        end_to_end = all(
            one.is_contiguous() and one.data_ptr() + one.nbytes == other.data_ptr() and one.dtype == other.dtype
            for one, other in pairwise(tensors)
        )
        first, last = tensors[0], tensors[-1]
        same = first.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
        if not (end_to_end and same and last.is_contiguous()):
            flat: Tensor = self._copy(tensors)
            return flat
        return first.as_strided([sum(tensor.numel() for tensor in tensors)], [1])


def _add_gradient(total: Tensor, parameter: nn.Parameter, there: set[nn.Parameter]) -> None:
    """Moves a parameter's gradient to the sum of this step, which begins with the first."""
    if parameter.grad is None:
        return
    if parameter in there:
        total.add_(parameter.grad)
    else:
        total.copy_(parameter.grad)
        there.add(parameter)
    parameter.grad = None


def _zero_all_but(there: set[nn.Parameter], totals: Mapping[nn.Parameter, Tensor]) -> None:
    """Parameters that took no part in this step."""
    if len(there) < len(totals):
        for parameter, total in totals.items():
            if parameter not in there:
                total.zero_()


def _nothing() -> None:
    pass


def _unchanged(group: int) -> None:
    """In place of DeepSpeed's making the weights views of the flat weights after each step: they still are."""
