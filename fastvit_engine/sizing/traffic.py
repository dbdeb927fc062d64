"""What a training step computes and sends, in order: the messages are those that DeepSpeed 0.19 issues, one by one.

| stage | once per step | once per micro-batch |
|---|---|---|
| 0, and 1 in bf16 | one all-reduce of all gradients, after the backward pass | |
| 1 | an all-reduce for each bucket; in the backward pass if it overlaps, else after it | |
| 2 | | an all-reduce for each bucket, in the backward pass (DeepSpeed reduces to all, not to the owner) |
| 3 | a gather for each persistent weight | gathers for both passes; a reduce-scatter for each bucket |

Stages 1 and 2 also gather the weights of each group of parameters after the update. A test records what DeepSpeed
issues, and compares.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

from torch import nn

from fastvit_engine.config import Config
from fastvit_engine.engine.optimizers.groups import parameter_groups
from fastvit_engine.engine.optimizers.kinds import KINDS
from fastvit_engine.sizing.gathers import (
    LIVE,
    PERSISTENCE,
    PREFETCH,
    REUSE,
    Done,
    Gather,
    Limits,
    Run,
    passes,
    units_of,
)
from fastvit_engine.sizing.parameters import COMPUTE_BYTES, learning_model
from fastvit_engine.sizing.state import UNBUCKETED, reduces_in_place

Kind = Literal["all_reduce", "reduce_scatter", "all_gather"]
_ALIGNED = 2  # numbers of each process that DeepSpeed pads a group of parameters to a multiple of
_DEFAULT_BUCKET = 500_000_000  # DeepSpeed's, in numbers
_IN_FLIGHT = 3  # buckets that stage 3 reduces at a time
SCALAR = 8  # bytes
_REPORT = 24  # bytes: loss, gradient norm and flags, which the engine sums over all processes after each step
_ADDED = re.compile(r"pos_embed|(cls|reg|mask)_token")


@dataclass(frozen=True)
class Message:
    """A collective operation: the bytes that each process has in the end, or had at the start."""

    kind: Kind
    bytes: int
    within_node: bool = False  # each node by itself


@dataclass(frozen=True)
class Compute:
    """A share of the computation of a micro-batch's pass."""

    forward: bool
    share: float


@dataclass(frozen=True)
class Send:
    """A message is issued. waits: nothing is computed until it has arrived."""

    message: Message
    waits: bool = True


@dataclass(frozen=True)
class Await:
    """Nothing is computed until the message of this number, from 0, has arrived."""

    message: int


Event = Compute | Send | Await


@dataclass(frozen=True)
class Settings:
    """What decides, besides the model, what is sent. Numbers are those of DeepSpeed's configuration."""

    stage: int
    processes: int
    per_node: int
    accumulation_steps: int
    bytes_per_number: int
    in_place: bool  # gradients are reduced where they lie, all at once
    overlaps: bool
    bucket: int = _DEFAULT_BUCKET
    persistence: int = PERSISTENCE
    limits: Limits = Limits(PREFETCH, LIVE, REUSE)
    secondary_shards: int = 1
    checks_overflow: bool = False

    @classmethod
    def of(cls, config: Config, processes: int, per_node: int, accumulation_steps: int) -> "Settings":
        """Of a configuration that leaves nothing open."""
        zero: dict[str, Any] = config.deepspeed.get("zero_optimization") or {}
        stage = config.zero.stage
        assert stage != "auto", "defaults.choose fills it in"
        return cls(
            stage=stage,
            processes=processes,
            per_node=per_node,
            accumulation_steps=accumulation_steps,
            bytes_per_number=_sent_bytes(config),
            in_place=reduces_in_place(config, stage),
            overlaps=bool(zero.get("overlap_comm", stage == 3)),
            bucket=int(zero.get("reduce_bucket_size", _DEFAULT_BUCKET)),
            persistence=int(zero.get("stage3_param_persistence_threshold", PERSISTENCE)),
            limits=Limits(
                int(zero.get("stage3_prefetch_bucket_size", PREFETCH)),
                int(zero.get("stage3_max_live_parameters", LIVE)),
                int(zero.get("stage3_max_reuse_distance", REUSE)),
            ),
            secondary_shards=int(zero.get("zero_hpz_partition_size", 1)),
            checks_overflow=config.train.precision != "fp32" and stage in (1, 2),
        )


def _sent_bytes(config: Config) -> int:
    """Of a gradient on its way."""
    given = config.deepspeed.get("communication_data_type")
    return COMPUTE_BYTES[config.train.precision] if given is None else COMPUTE_BYTES.get(given, 4)


def step_events(config: Config, settings: Settings) -> list[Event]:
    """All that happens in one step of every process, in the order of one."""
    model = learning_model(config.model, config.optimizer.frozen, config.pretraining)
    return _Step(config, settings, model).events


@dataclass
class _Step:
    config: Config
    settings: Settings
    model: nn.Module
    events: list[Event] = field(default_factory=list)
    sent: int = 0

    def __post_init__(self) -> None:
        self.parameters = list(self.model.parameters())
        self.forward_share, self.backward_share = _work_of(self.model)
        self.flushed: list[int] = []  # of a pass: the numbers of the messages that its buckets are reduced with
        steps = self.settings.accumulation_steps
        if self.settings.processes == 1:
            self.events = [Compute(True, steps), Compute(False, steps)]
            return
        if self.settings.stage == 3:
            self._stage_3()
        else:
            self._replicated()
        self._send("all_reduce", _REPORT)

    # ---- stages 0 to 2, whose weights are whole

    def _replicated(self) -> None:
        stage, last = self.settings.stage, self.settings.accumulation_steps - 1
        for number in range(self.settings.accumulation_steps):
            self.events.append(Compute(True, 1))
            hooked = stage == 2 or (stage == 1 and self.settings.overlaps and not self.settings.in_place)
            if hooked and (stage == 2 or number == last):
                self._reduce_in_pass()
            else:
                self.events.append(Compute(False, 1))
        groups = self._groups
        if stage == 0 or self.settings.in_place:
            numbers = [p.numel() for p in self.parameters if p.requires_grad] if stage == 0 else groups
            for size in _cut(numbers, UNBUCKETED):
                self._send("all_reduce", self._bytes(size))
        elif stage == 1 and not self.settings.overlaps:
            for bucket in _buckets((p for group in self._grouped for p in group), self.settings.bucket):
                for numel in self._reduced_at_once(bucket):
                    self._send("all_reduce", self._bytes(numel))
        if stage > 0:
            if not self.settings.in_place:
                for _ in range(2 + self.settings.checks_overflow):
                    self._send("all_reduce", SCALAR)
            for size in groups:
                self._send("all_gather", self._computed_bytes(size))

    def _reduce_in_pass(self) -> None:
        """Gradients come in the order of the backward pass. One bucket is reduced while the next one is filled."""
        share_of = dict(zip(self.parameters, self.backward_share, strict=True))
        learning = [parameter for parameter in reversed(self.parameters) if parameter.requires_grad]
        self.flushed, ahead = [], 0.0
        buckets = list(_buckets(learning, self.settings.bucket))
        for number, bucket in enumerate(buckets):
            computed = sum(share_of[parameter] for parameter in bucket) - ahead
            ahead = share_of[buckets[number + 1][0]] if number + 1 < len(buckets) else 0.0  # it comes, and is too much
            self._flush(self._reduced_at_once(bucket), computed + ahead, "all_reduce", in_flight=1)
        self.events.append(Await(self.sent - 1))

    def _reduced_at_once(self, bucket: Sequence[nn.Parameter]) -> list[int]:
        """The numbers of each message. A gradient that is larger than a bucket is cut where its owner changes."""
        if len(bucket) > 1 or bucket[0].numel() <= self.settings.bucket:
            return [sum(parameter.numel() for parameter in bucket)]
        first, owned = self._places[bucket[0]]
        ends = range(first // owned + 1, -(-(first + bucket[0].numel()) // owned))
        borders = [first, *(number * owned for number in ends), first + bucket[0].numel()]
        return list(_cut((end - start for start, end in pairwise(borders)), self.settings.bucket))

    @cached_property
    def _places(self) -> dict[nn.Parameter, tuple[int, int]]:
        """Where each parameter begins in its group, and how many numbers of that one process owns."""
        places: dict[nn.Parameter, tuple[int, int]] = {}
        for group, padded in zip(self._grouped, self._groups, strict=True):
            start = 0
            for parameter in group:
                places[parameter] = start, padded // self.settings.processes
                start += parameter.numel()
        return places

    def _flush(self, numels: Sequence[int], computed: float, kind: Kind, *, in_flight: int) -> None:
        """Reduces a bucket, when no more than `in_flight`, this one included, are on their way."""
        self._compute(False, computed)
        if self.settings.overlaps and len(self.flushed) >= in_flight:
            self.events.append(Await(self.flushed[-in_flight]))
        for numel in numels:
            self._send(kind, self._bytes(numel), waits=not self.settings.overlaps)
        self.flushed.append(self.sent - 1)

    # ---- stage 3

    def _stage_3(self) -> None:
        root = units_of(self.model, self.settings.persistence)
        steps = self.settings.accumulation_steps
        known: set[int] = set()  # of which each node has a copy of its own
        for events in passes(root, self.settings.limits, steps):
            self._pass_of_shards(events, known)
        for _ in range(2 + self.settings.checks_overflow):
            self._send("all_reduce", SCALAR)
        first = self.sent
        for parameter in self.parameters:
            if parameter.numel() < self.settings.persistence:
                self._send("all_gather", self._computed_bytes(self._padded(parameter.numel())), waits=False)
        self.events += [Await(number) for number in range(first, self.sent)]  # all are issued, then waited for

    def _pass_of_shards(self, usual: Sequence[Gather | Run | Done], known: set[int]) -> None:
        gathered: list[int] = []  # the number of the message that each gather ends with
        self.flushed, filled, computed = [], 0, 0.0
        for event in usual:
            if isinstance(event, Gather):
                self._gather(event, known)
                gathered.append(self.sent - 1)
            elif isinstance(event, Run):
                if event.after is not None:
                    self._compute(False, computed)
                    computed = 0.0
                    self.events.append(Await(gathered[event.after]))
                if event.forward:
                    self._compute(True, sum(self.forward_share[weight.number] for weight in event.unit.weights))
            else:
                for weight in reversed(event.unit.weights):
                    computed += self.backward_share[weight.number]
                    if not self.parameters[weight.number].requires_grad:
                        continue
                    if filled and filled + weight.numel > self.settings.bucket:
                        self._flush([filled], computed, "reduce_scatter", in_flight=_IN_FLIGHT)
                        filled, computed = 0, 0.0
                    filled += self._padded(weight.numel)
        self._flush([filled], computed, "reduce_scatter", in_flight=_IN_FLIGHT)
        self.events.append(Await(self.sent - 1))

    def _gather(self, event: Gather, known: set[int]) -> None:
        """What every node has a copy of is gathered within it: ZeRO++'s hpZ."""
        inside = [w for w in event.weights if self.settings.secondary_shards > 1 and w.number in known]
        outside = [w for w in event.weights if w not in inside]
        known |= {weight.number for weight in event.weights}
        for weights, within in ((inside, True), (outside, False)):
            if weights:
                numel = sum(self._padded(weight.numel) for weight in weights)
                self._send("all_gather", self._computed_bytes(numel), waits=False, within_node=within)

    # ---- sizes

    def _padded(self, numel: int) -> int:
        return -(-numel // self.settings.processes) * self.settings.processes

    @cached_property
    def _grouped(self) -> list[list[nn.Parameter]]:
        apart = KINDS[self.config.optimizer.kind].apart
        return [group["params"] for group in parameter_groups(self.model, self.config.optimizer, apart)]

    @cached_property
    def _groups(self) -> list[int]:
        unit = _ALIGNED * self.settings.processes
        return [-(-sum(p.numel() for p in group) // unit) * unit for group in self._grouped]

    def _bytes(self, numel: int) -> int:
        return numel * self.settings.bytes_per_number

    def _computed_bytes(self, numel: int) -> int:
        return numel * COMPUTE_BYTES[self.config.train.precision]

    def _compute(self, forward: bool, share: float) -> None:
        if share:
            self.events.append(Compute(forward, share))

    def _send(self, kind: Kind, size: int, *, waits: bool = True, within_node: bool = False) -> None:
        self.events.append(Send(Message(kind, size, within_node), waits))
        self.sent += 1


def _work_of(model: nn.Module) -> tuple[list[float], list[float]]:
    """Each parameter's share of the forward and of the backward pass, by its size.

    What is applied once for each image instead of each token, and what is only added, takes no time. If only such a
    parameter learns, the backward pass is its own.
    """
    of_classifier = getattr(model, "of_classifier", ("head.weight",))
    sizes, learning = [], []
    for name, parameter in model.named_parameters():
        works = parameter.ndim > 1 and name not in of_classifier and not _ADDED.search(name)
        sizes.append(parameter.numel() * works)
        learning.append(sizes[-1] * parameter.requires_grad)
    if not any(learning):
        learning = [parameter.numel() * parameter.requires_grad for parameter in model.parameters()]
    return _shares(sizes), _shares(learning)


def _shares(sizes: Sequence[int]) -> list[float]:
    whole = sum(sizes)
    return [size / whole for size in sizes]


def _buckets(parameters: Iterable[nn.Parameter], most: int) -> Iterator[list[nn.Parameter]]:
    """Of so many numbers at the most. A parameter that is larger has a bucket of its own."""
    bucket: list[nn.Parameter] = []
    filled = 0
    for parameter in parameters:
        if bucket and filled + parameter.numel() > most:
            yield bucket
            bucket, filled = [], 0
        bucket.append(parameter)
        filled += parameter.numel()
    yield bucket


def _cut(sizes: Iterable[int], most: int) -> Iterator[int]:
    """The sums of neighbours that are sent together, which end with the one that is too much."""
    filled = 0
    for size in sizes:
        filled += size
        if filled > most:
            yield filled
            filled = 0
    if filled:
        yield filled
