"""Which parameters ZeRO-3 gathers when, in one forward and backward pass: DeepSpeed's rules, followed step by step.

DeepSpeed 0.19 fetches the parameters of a module before it runs, prefetches those of the next ones, and lets go of a
module's parameters after it has run, unless they are needed again soon (`partitioned_param_coordinator.py`).
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf

from torch import nn

# What is gathered for good, in numbers, and how far ahead: what DeepSpeed does if it is told nothing.
PERSISTENCE, PREFETCH, LIVE, REUSE = 100_000, 50_000_000, 1_000_000_000, 1_000_000_000


@dataclass(frozen=True)
class Weight:
    """A parameter, by its position among all."""

    number: int
    numel: int
    persistent: bool  # small: whole on every process
    learns: bool = True


@dataclass(frozen=True)
class Unit:
    """A module whose own parameters, if any, are gathered when it is called; a leaf, with all that is inside."""

    name: str
    weights: tuple[Weight, ...]  # that are gathered with it
    direct: tuple[Weight, ...]  # that are its own, and no child's
    children: tuple["Unit", ...] = ()
    leaf: bool = False

    def all_weights(self) -> Iterator[Weight]:
        yield from self.weights
        for child in self.children:
            yield from child.all_weights()


@dataclass(frozen=True)
class Limits:
    """Of `zero_optimization`, in numbers."""

    prefetch: int
    live: int
    reuse: int


@dataclass(frozen=True)
class Gather:
    """One collective operation gathers these weights."""

    weights: tuple[Weight, ...]

    @property
    def numel(self) -> int:
        return sum(weight.numel for weight in self.weights)


@dataclass(frozen=True)
class Run:
    """A module begins to run, or its backward pass does, when its weights are there.

    after: the number of the latest gather that it waits for; None if there is none.
    """

    unit: Unit
    forward: bool
    after: int | None


@dataclass(frozen=True)
class Done:
    """The backward pass of a module, and of all inside it, has ended."""

    unit: Unit


Event = Gather | Run | Done


def units_of(model: nn.Module, persistence: int = PERSISTENCE) -> Unit:
    """The modules of a model in the order in which they are registered, which is taken for that of their calls.

    Those without weights are among them: weights are prefetched whenever a module is called.
    """
    numbers = {id(parameter): number for number, parameter in enumerate(model.parameters())}

    def weights_of(module: nn.Module, *, recurse: bool) -> tuple[Weight, ...]:
        return tuple(
            Weight(numbers[id(p)], p.numel(), p.numel() < persistence, p.requires_grad)
            for p in module.parameters(recurse=recurse)
        )

    def unit(name: str, module: nn.Module) -> Unit:
        own = weights_of(module, recurse=False)
        if getattr(module, "_z3_leaf", False):
            return Unit(name, weights_of(module, recurse=True), own, leaf=True)
        inside = (unit(f"{name}.{called}" if name else called, child) for called, child in module.named_children())
        return Unit(name, own, own, tuple(inside))

    return unit("", model)


def passes(model: Unit, limits: Limits, count: int = 1) -> list[list[Event]]:
    """What happens in each of the `count` passes of a step, once DeepSpeed knows the order of the modules.

    What it lets go of after a module is decided in the first pass of which it knows that order, and kept from then on.
    If a step has several passes, that is the second of the run, before which it has let go of the persistent weights
    too. What is still whole after a pass is not gathered for the next one of the step.
    """
    return [coordinator.events for coordinator in _coordinators(model, limits, count)]


def left_whole(model: Unit, limits: Limits) -> int:
    """Numbers still whole after a pass, but for the persistent weights: those of leaves without a backward pass."""
    (coordinator,) = _coordinators(model, limits, 1)
    return sum(weight.numel for weight in coordinator.left)


def _coordinators(model: Unit, limits: Limits, count: int) -> "list[_Coordinator]":
    decisions: dict[tuple[int, int], set[Weight]] = {}
    _Coordinator(model, limits, decisions, persistent_are_there=count == 1).play()
    done: list[_Coordinator] = []
    for _ in range(count):
        done.append(_Coordinator(model, limits, decisions, done[-1].left if done else frozenset()))
        done[-1].play()
    return done


@dataclass
class _Coordinator:
    """DeepSpeed's, as far as it decides what is gathered."""

    model: Unit
    limits: Limits
    decisions: dict[tuple[int, int], set[Weight]]  # by unit and step: what may be let go of
    kept: frozenset[Weight] = frozenset()  # whole from the pass before
    persistent_are_there: bool = True
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.differentiated = _differentiated(self.model)
        backward = (unit for unit in _in_order(self.model, forward=False) if id(unit) in self.differentiated)
        self.order = [*_in_order(self.model, forward=True), *backward]
        self.queue = deque((weight, step) for step, unit in enumerate(self.order) for weight in _sorted(unit.weights))
        self.step, self.whole = 0, sum(weight.numel for weight in self.kept)
        self.gathered = {weight.number for weight in self.kept}  # whole, or on the way
        if self.persistent_are_there:
            self.gathered |= {weight.number for weight in self.model.all_weights() if weight.persistent}
        self.gathered |= {weight.number for weight in self.model.weights if weight.persistent}
        self.on_the_way: dict[int, int] = {}  # by weight, the number of its gather
        self.gathers = 0
        self.latest: dict[int, float] = {}  # the step of the latest use that a weight was fetched for
        self.active: dict[int, set[int]] = {}

    @property
    def left(self) -> frozenset[Weight]:
        return frozenset(w for w in self.model.all_weights() if w.number in self.gathered and not w.persistent)

    def play(self) -> None:
        self.forward(self.model)
        self.backward(self.model)

    def forward(self, unit: Unit) -> None:
        self._run(unit, forward=True)
        for child in unit.children:
            self.forward(child)
        self._release(unit)

    def backward(self, unit: Unit) -> None:
        if id(unit) not in self.differentiated:
            return
        self._run(unit, forward=False)
        for child in reversed(unit.children):
            self.backward(child)
        self.events.append(Done(unit))
        self._release(unit)

    def _run(self, unit: Unit, *, forward: bool) -> None:
        own = set(unit.weights)
        self._gather([weight for weight in unit.weights if weight.number not in self.gathered])
        awaited = [self.on_the_way.pop(weight.number) for weight in own if weight.number in self.on_the_way]
        for weight in own:
            self.active.setdefault(weight.number, set()).add(id(unit))
        new = {weight for weight in own if self.latest.get(weight.number, -inf) < self.step}
        seen: set[Weight] = set()
        while self.queue and len(seen) < len(new):
            weight, step = self.queue.popleft()
            self.latest[weight.number] = step
            seen.add(weight)
        self._prefetch()
        self.events.append(Run(unit, forward, max(awaited, default=None)))
        self.step += 1

    def _prefetch(self) -> None:
        room, ahead, numel = min(self.limits.live - self.whole, self.limits.prefetch), [], 0
        while self.limits.prefetch and self.queue and numel < room:
            weight, step = self.queue.popleft()
            self.latest[weight.number] = max(self.latest.get(weight.number, -inf), step)
            if weight.number not in self.gathered and weight not in ahead:
                ahead.append(weight)
                numel += weight.numel
        self._gather(ahead)

    def _gather(self, weights: Sequence[Weight]) -> None:
        if weights:
            self.events.append(Gather(tuple(weights)))
            self.whole += sum(weight.numel for weight in weights)
            self.gathered |= {weight.number for weight in weights}
            self.on_the_way |= dict.fromkeys((weight.number for weight in weights), self.gathers)
            self.gathers += 1

    def _release(self, unit: Unit) -> None:
        key = (id(unit), self.step)
        if key not in self.decisions:
            self.decisions[key] = self._may_go(unit)
        for weight in unit.weights:
            self.active[weight.number].discard(id(unit))
            there = weight.number in self.gathered and weight.number not in self.on_the_way
            if weight in self.decisions[key] and there and not self.active[weight.number]:
                self.gathered.remove(weight.number)
                self.whole -= weight.numel

    def _may_go(self, unit: Unit) -> set[Weight]:
        """Of its weights, those that are not needed again soon, nor prefetched for a later use."""
        going = {w for w in unit.weights if not w.persistent and self.latest.get(w.number, -inf) <= self.step}
        traversed = 0
        for later in self.order[self.step :]:
            if traversed >= self.limits.reuse:
                break
            for weight in later.all_weights() if unit.leaf else later.direct:
                going.discard(weight)
                traversed += weight.numel
        return going


def _sorted(weights: Sequence[Weight]) -> list[Weight]:
    return sorted(weights, key=lambda weight: weight.number)


def _differentiated(model: Unit) -> set[int]:
    """The units that have a backward pass: those that learn, those around them, and those that are called later."""
    reached: set[int] = set()

    def visit(unit: Unit, learned: bool) -> bool:
        learned = learned or any(weight.learns for weight in unit.weights)
        for child in unit.children:
            learned = visit(child, learned)
        if learned:
            reached.add(id(unit))
        return learned

    visit(model, learned=False)
    return reached


def _in_order(unit: Unit, *, forward: bool) -> Iterator[Unit]:
    yield unit
    for child in unit.children if forward else reversed(unit.children):
        yield from _in_order(child, forward=forward)
