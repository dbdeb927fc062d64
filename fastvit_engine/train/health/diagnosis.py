"""Who and what is at fault when a step must not be taken.

The verdict (see `guard`) is about sums over all processes, which say that something is wrong, not where. The answer is
with each process: the losses of its samples, its weights, and its gradients before they are reduced. The step is
computed once more, with a hook on every parameter that looks at the gradient of this process alone. A fault in the
data or the numerics is there again; one that is not was most likely made by the hardware.
"""

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit_engine.data import Batch
from fastvit_engine.distributed.world import World
from fastvit_engine.engine.protocol import TrainingEngine
from fastvit_engine.train.health.guard import Anomaly, StepReport
from fastvit_engine.train.health.replicas import nonfinite_weights


class Trace(NamedTuple):
    """What a process keeps of a step until the next."""

    batches: list[Batch]  # its micro-batches
    losses: list[Tensor]  # of their samples, each [B], on the device


class GradientWatch:
    """Notes for each parameter whether the gradient of this process alone was finite, in every backward pass.

    One reduction of each gradient, on the device; read only when something is wrong.
    """

    def __init__(self, engine: TrainingEngine, device: torch.device) -> None:
        self._named = engine.named_parameters()
        self._norms = torch.zeros(len(self._named), device=device)
        self._hooks: list[Any] = []

    @property
    def on(self) -> bool:
        return bool(self._hooks)

    def start(self) -> None:
        """From now on, until `stop`."""
        if not self._hooks:
            self._hooks = [p.register_hook(self._look(index)) for index, (_, p) in enumerate(self._named)]

    def stop(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def clear(self) -> None:
        """A new step begins."""
        self._norms.zero_()

    def broken(self) -> list[str]:
        """The parameters whose gradient was not finite since the step began."""
        finite = self._norms.isfinite().tolist()
        return [name for (name, _), good in zip(self._named, finite, strict=True) if not good]

    def _look(self, index: int) -> Callable[[Tensor], None]:
        def look(gradient: Tensor) -> None:
            self._norms[index] += torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)

        return look


@dataclass(frozen=True)
class Diagnosis:
    """What is known of an anomaly; the same on every process."""

    cause: str  # for people
    ranks: list[int]  # at fault; none if nothing tells
    hosts: list[str]  # theirs
    keys: list[str]  # of the samples at fault, or of all that were in flight on these ranks (or, without ranks, on all)
    parameters: list[str]  # whose weights, or local gradients, were not finite
    repeats: bool | None  # whether computing the step again gave an anomaly again; None if it was not asked
    in_weights: bool  # the weights are at fault, not the data
    unexplained: bool  # a gradient that was not finite, once, nobody knows on which rank
    everywhere: bool = False  # no sample and no process stands out: neither the data nor a host is at fault

    @property
    def at(self) -> str:
        """The ranks in a sentence, as in " on rank 2 (node17)"; "" if none is known, or all are alike."""
        if not self.ranks or self.everywhere:
            return ""
        named = ", ".join(f"{rank} ({host})" for rank, host in zip(self.ranks, self.hosts, strict=True))
        return f" on rank{'s' if len(self.ranks) > 1 else ''} {named}"

    def remedy(self, *, updated: bool) -> str:
        """What to do about it, as in "lower optimizer.learning_rate". `updated`: the weights are not the first ones."""
        if self.everywhere and not updated:
            return "correct data.mean, data.std, model.head_bias, model.layer_scale or train.precision"
        if self.everywhere:
            return "lower optimizer.learning_rate, lengthen schedule.warmup, or set a lower train.grad_clip"
        if self.in_weights or self.repeats is False:
            hosts = ", ".join(dict.fromkeys(self.hosts)) or "the hosts that fail again"
            return f"leave out {hosts}, or lower optimizer.learning_rate if the hardware is sound"
        return "repair or remove the samples that are named there, or lower optimizer.learning_rate"


class _Evidence(NamedTuple):
    """Of one process."""

    host: str
    keys: list[str]  # of the step
    suspects: list[str]  # samples whose own loss is not finite, or micro-batches over the limit
    weights: tuple[str, ...]
    gradients: list[str]  # in the step itself, if it was watched
    gradients_again: list[str]  # in the repetition


def diagnose(
    anomaly: Anomaly,
    trace: Trace,
    rehearse: Callable[[], StepReport],
    engine: TrainingEngine,
    watch: GradientWatch,
    world: World,
) -> Diagnosis:
    """Finds the cause of an anomaly; collective. `rehearse` computes the step again without updating anything.

    If a gradient fault has left no trace of its origin, the watch stays on, so that the next one has a name.
    Leaves gradients and counters of the engine as after a whole step.
    """
    weights, was_on = nonfinite_weights(engine, world.device), watch.on
    watched = watch.broken() if was_on else []
    in_weights = anomaly.kind in ("weights", "replicas") or any(world.gather(bool(weights)))
    repeats: bool | None = None
    again: list[str] = []
    if not in_weights:
        watch.start()
        repeats = rehearse().anomaly is not None
        again = watch.broken()
    keys = [key for batch in trace.batches for key in batch.keys if key]  # without padding
    own = _Evidence(socket.gethostname(), keys, _suspects(anomaly, trace), weights, watched, again)
    diagnosis = _conclude(anomaly, world.gather(own), in_weights, repeats)
    if not was_on and not diagnosis.unexplained:
        watch.stop()
    return diagnosis


def _suspects(anomaly: Anomaly, trace: Trace) -> list[str]:
    """Of this process: the samples whose loss is not finite; of a loss spike, those of micro-batches over the limit."""
    found = []
    for batch, losses in zip(trace.batches, trace.losses, strict=True):
        if anomaly.kind == "loss spike" and anomaly.limit is not None and losses.mean().item() > anomaly.limit:
            found += batch.keys
        else:
            finite = losses.isfinite().tolist()
            found += [key for key, good in zip(batch.keys, finite, strict=True) if key and not good]
    return found


def _conclude(anomaly: Anomaly, evidence: list[_Evidence], in_weights: bool, repeats: bool | None) -> Diagnosis:
    def ranks_with(field: str) -> list[int]:
        return [rank for rank, own in enumerate(evidence) if getattr(own, field)]

    if in_weights:
        # The comparison names ranks itself; a loss that is not finite may come from weights that are not.
        ranks = list(anomaly.ranks) or ranks_with("weights")
        parameters = sorted({name for rank in ranks for name in evidence[rank].weights})
        keys = [key for rank in ranks for key in evidence[rank].keys]
        cause = "hardware suspected" if anomaly.kind == "replicas" else f"weights are not finite ({_some(parameters)})"
        # A flipped bit breaks one parameter of one process; updates that overflow break many, in every copy.
        everywhere = anomaly.kind != "replicas" and len(ranks) == len(evidence) and len(parameters) > 1
    else:
        ranks = ranks_with("suspects") or ranks_with("gradients") or ranks_with("gradients_again")
        if len(ranks) == len(evidence) and anomaly.kind == "loss spike":
            ranks = []  # no rank stands out
        shown = [evidence[rank] for rank in ranks] or evidence
        keys = [key for own in shown for key in own.suspects] or [key for own in shown for key in own.keys]
        parameters = sorted({name for own in shown for name in [*own.gradients, *own.gradients_again]})
        everywhere = bool(repeats) and _is_everywhere(anomaly, evidence)
        if everywhere:
            cause = "numerics, as no sample and no process stands out when the step is repeated"
        elif repeats:
            cause = "data or numerics, as it is there again when the step is repeated"
        else:
            cause = "hardware suspected, as it is gone when the step is repeated"
        if parameters:
            cause += f" (gradients that are not finite: {_some(parameters)})"
    unexplained = anomaly.kind == "gradient" and repeats is False and not ranks
    if unexplained:
        cause += "; which rank is not known, but from now on each one's gradients are watched"
    hosts = [evidence[rank].host for rank in ranks]
    return Diagnosis(cause, ranks, hosts, keys, parameters, repeats, in_weights, unexplained, everywhere)


def _is_everywhere(anomaly: Anomaly, evidence: list[_Evidence]) -> bool:
    """Whether the loss of every sample is not finite; or, of finite losses, the gradient of every process."""
    if anomaly.kind == "loss":
        return all(len(own.suspects) == len(own.keys) for own in evidence)
    return anomaly.kind == "gradient" and all(own.gradients_again and not own.suspects for own in evidence)


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
