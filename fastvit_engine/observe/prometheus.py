"""The latest figures of a run, over HTTP in Prometheus's text format.

Each is served from when it is known; rates and shares are 0 to 1. docs/observe.md lists them.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import fastvit_engine
from fastvit_engine.errors import UserError
from fastvit_engine.observe.disk import reason
from fastvit_engine.observe.events import Event, listening
from fastvit_engine.observe.metrics import EvalRow, FewShotRow, LossRow, OwnRow, Row, TrainRow
from fastvit_engine.observe.optional import require

if TYPE_CHECKING:
    from prometheus_client import Metric

# Name without "fastvit_", and meaning, of each number of a training row.
_TRAINING = {
    "step": ("step", "Optimizer steps taken, at the last row of metrics"),
    "epoch": ("epoch", "Epochs trained"),
    "samples": ("samples", "Training images consumed"),
    "loss": ("loss", "Training loss"),
    "lr": ("learning_rate", "Learning rate"),
    "grad_norm": ("grad_norm", "Norm of the gradient before clipping"),
    "images_per_second": ("images_per_second", "Images per second of the whole job"),
    "mfu": ("mfu_ratio", "Share of the peak FLOP/s"),
    "data_wait": ("data_wait_ratio", "Share of the step spent waiting for data"),
    "memory_bytes": ("memory_bytes", "Largest peak memory of a process"),
    "seconds": ("training_seconds", "Training time so far, restarts included"),
    "bad_samples": ("bad_samples", "Training images so far that could not be used"),
}
_EVALUATION = {
    "step": ("eval_step", "Optimizer steps taken at the last evaluation"),
    "top1": ("eval_top1_ratio", "Top-1 accuracy of the last evaluation"),
    "top5": ("eval_top5_ratio", "Top-5 accuracy of the last evaluation"),
    "loss": ("eval_loss", "Loss of the last evaluation"),
}


# By the field of HostFigures.
_HOSTS = {
    "step": ("host_step", "Optimizer steps taken by the process of a machine that is furthest behind"),
    "silent_seconds": ("host_silent_seconds", "Time since the oldest last heartbeat of the processes of a machine"),
    "work_share": ("host_work_ratio", "Largest share of time that a process spent on its own data and forward pass"),
}


class HostFigures(NamedTuple):
    """What is known of the processes of one machine."""

    host: str
    step: int  # of the process that is furthest behind
    silent_seconds: float  # since the heartbeat of the process that has been silent for longest
    work_share: float | None  # largest share of the time that one spent on its own data and forward pass


class Exporter:
    """A tracker that serves what it was given last."""

    def __init__(self, run: str) -> None:
        self._run = run
        self.total_steps: int | None = None
        self.hosts: Callable[[], Iterable[HostFigures]] = tuple  # called at each request
        self._row: TrainRow | None = None
        self._row_time: float | None = None
        self._evaluations: dict[str, EvalRow | LossRow] = {}
        self._few_shot: dict[str, FewShotRow] = {}
        self._own: dict[str, OwnRow] = {}
        self._events = Counter[str]()

    def __str__(self) -> str:
        return "the port for Prometheus"

    def write(self, row: Row) -> None:
        if "shots" in row:
            few_shot = cast(FewShotRow, row)
            self._few_shot[few_shot["eval"]] = few_shot
        elif "figures" in row:
            own = cast(OwnRow, row)
            self._own[own["eval"]] = own
        elif "eval" in row:
            evaluation = cast(EvalRow | LossRow, row)
            self._evaluations[evaluation["eval"]] = evaluation
        else:
            self._row, self._row_time = cast(TrainRow, row), time.time()

    def close(self) -> None:
        """The port stays open until the run ends, also while it goes back to a checkpoint."""

    def count(self, event: Event) -> None:
        self._events[event["event"]] += 1

    def describe(self) -> "Iterable[Metric]":
        """Nothing: which figures there are is known when they are collected."""
        return ()

    def collect(self) -> "Iterator[Metric]":
        """Every figure that is known by now."""
        row: Mapping[str, Any] = {} if self._row is None else self._row
        yield from _gauge("run_info", "The run, and the version of the engine", ("run", "version"), [
            (1, self._run, fastvit_engine.__version__)
        ])  # fmt: skip
        yield from _gauge("total_steps", "Optimizer steps of the whole run", (), [(self.total_steps,)])
        yield from _gauge("last_row_timestamp_seconds", "When the last row was written", (), [(self._row_time,)])
        for key, (name, meaning) in _TRAINING.items():
            yield from _gauge(name, meaning, (), [(row.get(key),)])
        evaluations: list[Mapping[str, Any]] = [*self._evaluations.values()]
        for key, (name, meaning) in _EVALUATION.items():
            yield from _gauge(
                name, meaning, ("weights",), [(one.get(key), _weights(one["eval"])) for one in evaluations]
            )
        yield from _gauge("fewshot_accuracy_ratio", "Mean accuracy of few-shot classifiers", ("shots", "weights"), [
            (found["mean"], shots, _weights(one["eval"]))
            for one in [*self._few_shot.values()]
            for shots, found in one["shots"].items()
        ])  # fmt: skip
        yield from _gauge("evaluator_figure", "Of an evaluator of one's own", ("evaluator", "figure", "weights"), [
            (number, one["eval"].removesuffix("_ema"), name, _weights(one["eval"]))
            for one in [*self._own.values()]
            for name, number in one["figures"].items()
        ])  # fmt: skip
        yield _events([*self._events.items()])
        hosts = list(self.hosts())
        for field, (name, meaning) in _HOSTS.items():
            yield from _gauge(name, meaning, ("host",), [(getattr(one, field), one.host) for one in hosts])


def _weights(evaluation: str) -> str:
    return "ema" if evaluation.endswith("_ema") else "model"


def _gauge(name: str, meaning: str, labels: Sequence[str], samples: Iterable[tuple[Any, ...]]) -> "Iterator[Metric]":
    """The figure with each sample, a value followed by its labels; without those whose value is not known."""
    from prometheus_client.core import GaugeMetricFamily

    if known := [sample for sample in samples if sample[0] is not None]:
        family = GaugeMetricFamily(f"fastvit_{name}", meaning, labels=labels)
        for value, *of in known:
            family.add_metric(of, value)
        yield family


def _events(counts: Iterable[tuple[str, int]]) -> "Metric":
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily("fastvit_events", "Events that rank 0 recorded since it started", labels=("event",))
    for event, count in counts:
        family.add_metric((event,), count)
    return family


def check_installed(port: int | None) -> None:
    """Raises UserError if there is to be a port and prometheus_client is missing."""
    if port is not None:
        require("observe.prometheus_port", "prometheus", "prometheus_client")


@contextmanager
def served(exporter: Exporter, address: str, port: int) -> Iterator[None]:
    """Serves what the exporter has to all who ask during the block. Raises UserError if the port cannot be had."""
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry(auto_describe=False)
    registry.register(exporter)
    try:
        server, thread = start_http_server(port, address, registry)
    except OSError as error:
        raise UserError(
            f"port {port} of {address} cannot be used for Prometheus ({reason(error)}): set observe.prometheus_port "
            "to a free one, and observe.prometheus_host to an address of this machine"
        ) from error
    try:
        with listening(exporter.count):
            yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
