"""What a training step costs beyond a bare PyTorch loop on the same model and batches, on one CPU thread.

    python -m benchmarks.step_overhead [--quick] --out DIR

Nine training loops exist side by side in one process, each on its own thread, and only one of them runs at a time:
the others are blocked inside `next(batches)`. A turn of a loop is therefore timed from one request for a batch to the
one N steps later, whatever the loop does in between, and set-up, first steps and the final checkpoint stay outside. In
every round each loop has one turn, in an order that rotates, so that a slow moment of the machine hits all of them.

`bare`         a plain PyTorch loop: model, loss, backward, clipping, fused AdamW, learning rate.
`control`      the same again: its difference from `bare` is the noise of this machine.
`ddp`          the same with the model in PyTorch's DistributedDataParallel: what a run without DeepSpeed would pay.
`deepspeed-Z`  the same through the DeepSpeed engine at ZeRO stage Z, as `build_engine` makes it.
`loop-Z`       the real training loop, `fastvit_engine.train.loop._train`, on training data that gives the resident
               batches, with its log lines written to a file.
"""

import argparse
import contextlib
import ctypes
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from time import perf_counter
from typing import Any, TextIO
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastvit_engine.checkpoint import TrainerState
from fastvit_engine.checkpoint.in_memory import Held, HeldCopies, Messages
from fastvit_engine.checkpoint.owner import Ownership
from fastvit_engine.checkpoint.records import Records
from fastvit_engine.config import Config, DataConfig, Resolved, load_config
from fastvit_engine.data import Batch, TrainingData
from fastvit_engine.data.stream.batch_split import split_batch
from fastvit_engine.distributed.preemption import Preemption
from fastvit_engine.distributed.supervise import free_port, rank_environment
from fastvit_engine.distributed.watchdog import Watchdog
from fastvit_engine.distributed.world import World, join_world
from fastvit_engine.engine.build import build_engine
from fastvit_engine.engine.optimizers.groups import parameter_groups
from fastvit_engine.files import atomic_write
from fastvit_engine.models import build_vit, parameter_count
from fastvit_engine.objectives import build_objective, find_objective
from fastvit_engine.observe.environment import collect_environment
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.sizing.defaults import choose
from fastvit_engine.sizing.machine import machine_of
from fastvit_engine.train import loop
from fastvit_engine.train.observers import Observers
from fastvit_engine.train.schedule import Schedule
from fastvit_engine.train.start import Start
from fastvit_kernels import FusedCrossEntropy

STAGES = (0, 1, 2, 3)
VARIANTS = ("bare", "control", "ddp", *(f"deepspeed-{stage}" for stage in STAGES), "loop-0", "loop-1")
COMPARISONS = (
    ("bare", None),
    ("control", "bare"),
    ("ddp", "bare"),
    *((f"deepspeed-{stage}", "bare") for stage in STAGES),
    ("loop-0", "bare"),
    ("loop-1", "bare"),
    ("loop-0", "deepspeed-0"),
    ("loop-1", "deepspeed-1"),
)
RESIDENT_BATCHES = 4

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model, and how long it is measured. The training loop logs once per turn, so that every turn costs the same."""

    name: str
    settings: tuple[str, ...]  # over the recipe `quickstart`
    turn_steps: int
    rounds: int
    warmup_steps: int

    @property
    def total_steps(self) -> int:
        return self.warmup_steps + self.rounds * self.turn_steps + 1  # the last one lets every loop come to its end

    def resolve(self, zero_stage: int) -> Resolved:
        unmeasured = ["data.train_samples=1000", "data.eval=null", "evaluate.every=null", "checkpoint.every=null"]
        length = [f"train.duration={self.total_steps} steps", f"train.log_every={self.turn_steps}"]
        return load_config("quickstart", [*unmeasured, *length, f"zero.stage={zero_stage}", *self.settings])


CASES = (
    Case("quickstart, 32 images", ("train.global_batch_size=32",), turn_steps=10, rounds=50, warmup_steps=10),
    Case(
        "Ti/16 at 224, 8 images",
        (
            "model={name: Ti/16, image_size: 224, num_classes: 1000}",
            "train.global_batch_size=8",
        ),
        turn_steps=1,
        rounds=28,
        warmup_steps=2,
    ),
)


@dataclass(frozen=True)
class Measurement:
    """Milliseconds per optimizer step of each variant in each round, and the weights each ended with."""

    case: Case
    milliseconds: dict[str, list[float]]
    weights: dict[str, Weights]

    @property
    def weight_difference(self) -> float:
        """The largest difference of any weight of any variant from that of `bare`, key biases left out."""
        bare = self.weights["bare"]
        return max(
            (_without_key_bias(name, weights[name]) - _without_key_bias(name, weight)).abs().max().item()
            for weights in self.weights.values()
            for name, weight in bare.items()
        )


def _without_key_bias(name: str, weight: Tensor) -> Tensor:
    """The weight without key biases, which two runs of the same training do not share.

    A key bias adds the same to all scores of a query, which softmax drops: its gradient is rounding noise, and Adam
    scales noise up to full steps.
    """
    if not name.endswith("attn.qkv.bias"):
        return weight
    query, _, value = weight.chunk(3)
    return torch.cat([query, value])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the first model only, in few rounds: does it run?")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="where step_overhead.json and .md go")
    args = parser.parse_args(arguments)
    cases = [Case(**{**asdict(CASES[0]), "rounds": 5})] if args.quick else CASES
    environment = describe_machine("python -m benchmarks.step_overhead" + " --quick" * args.quick)
    results = {"environment": environment, "cases": [summarize(result) for result in measure(cases)]}
    write(results, args.out)
    print(render(results))


def measure(cases: Sequence[Case]) -> list[Measurement]:
    """Measures every case in this process, on one thread, as the only process of a Gloo world."""
    torch.set_num_threads(1)
    _share_one_heap()
    with patch.dict(os.environ, rank_environment(rank=0, processes=1, port=free_port())), join_world() as world:
        return [_measure_case(case, world) for case in cases]


def _share_one_heap() -> None:
    """Gives all threads the heap of the main thread, which a training run has.

    With glibc's default, a heap per thread, copies of the same loop differed by up to 7 %: some returned memory to the
    system at every step.
    """
    m_arena_max = -8  # malloc.h
    if ctypes.CDLL(None).mallopt(m_arena_max, 1) != 1:
        raise RuntimeError("glibc refused M_ARENA_MAX = 1")


def _measure_case(case: Case, world: World) -> Measurement:
    resident = resident_batches(case.resolve(0).config)
    milliseconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "log"), "w") as log:
        racers = {name: _start(name, case, resident, world, Path(folder), log) for name in VARIANTS}
        for racer in racers.values():
            racer.take_turn(case.warmup_steps)
        for round_ in range(case.rounds):
            first = round_ % len(VARIANTS)
            for name in VARIANTS[first:] + VARIANTS[:first]:
                seconds = racers[name].take_turn(case.turn_steps)
                milliseconds[name].append(1000 * seconds / case.turn_steps)
        weights = {name: racer.finish() for name, racer in racers.items()}
    return Measurement(case, milliseconds, weights)


def _start(variant: str, case: Case, resident: Sequence[Batch], world: World, folder: Path, log: TextIO) -> "Racer":
    """Brings the loop of a variant up to its first step."""
    racer = Racer(resident)
    kind, _, stage = variant.partition("-")
    resolved = case.resolve(int(stage or 0))
    train = {
        "bare": lambda: train_bare(resolved.config, racer.batches),
        "control": lambda: train_bare(resolved.config, racer.batches),
        "ddp": lambda: train_bare(resolved.config, racer.batches, wrap=nn.parallel.DistributedDataParallel),
        "deepspeed": lambda: train_with_deepspeed(resolved.config, world, racer.batches),
        "loop": lambda: train_with_loop(resolved, world, folder / variant, racer.batches),
    }[kind]
    with contextlib.redirect_stderr(log):  # where the progress display finds a run without a terminal
        racer.start(train)
    return racer


class Racer:
    """A training loop on its own thread, which is blocked inside `next(racer.batches)` between its turns."""

    def __init__(self, resident: Sequence[Batch]) -> None:
        self.batches = self._until_told_to_wait(resident)
        self._turns: SimpleQueue[int] = SimpleQueue()
        self._reports: SimpleQueue[float | Weights | BaseException] = SimpleQueue()

    def start(self, train: Callable[[], Weights]) -> None:
        """Lets the loop set itself up; returns when it asks for its first batch."""
        Thread(target=self._run, args=[train], daemon=True).start()
        self._report()

    def take_turn(self, steps: int) -> float:
        """Lets the loop do `steps` optimizer steps; returns the seconds they took."""
        self._turns.put(steps)
        seconds = self._report()
        assert isinstance(seconds, float), "the loop ended before its last step"
        return seconds

    def finish(self) -> Weights:
        """Lets the loop do its last step and come to its end; returns the weights."""
        self._turns.put(1)
        weights = self._report()
        assert isinstance(weights, dict), "the loop asked for a batch after its last step"
        return weights

    def _report(self) -> float | Weights:
        report = self._reports.get()
        if isinstance(report, BaseException):
            raise report
        return report

    def _run(self, train: Callable[[], Weights]) -> None:
        try:
            self._reports.put(train())
        except BaseException as error:  # raised again by the thread that waits for the report
            self._reports.put(error)

    def _until_told_to_wait(self, resident: Sequence[Batch]) -> Iterator[Batch]:
        endless, seconds = cycle(resident), 0.0
        while True:
            self._reports.put(seconds)
            steps = self._turns.get()
            start = perf_counter()
            yield from islice(endless, steps)  # over when the loop asks for the batch after these
            seconds = perf_counter() - start


def train_bare(
    config: Config, batches: Iterator[Batch], wrap: Callable[[nn.Module], nn.Module] = lambda model: model
) -> Weights:
    """wrap: makes what is called for the forward passes of the model."""
    schedule = Schedule(config, config.data.train_samples)
    torch.manual_seed(config.seed)
    model = build_vit(config.model, mean=config.data.mean, std=config.data.std)
    criterion = FusedCrossEntropy(config.loss.kind)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.optimizer),
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        fused=True,  # as the engine's
    )
    assert config.train.grad_clip is not None
    called = wrap(model)
    for step, batch in zip(range(schedule.total_steps), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step)
        loss = criterion(called(batch.images), batch.labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.train.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def train_with_deepspeed(config: Config, world: World, batches: Iterator[Batch]) -> Weights:
    schedule = Schedule(config, config.data.train_samples)
    torch.manual_seed(config.seed)
    model = build_vit(config.model, mean=config.data.mean, std=config.data.std)
    engine = build_engine(model, config, split_batch(config, world.size), world)
    criterion = FusedCrossEntropy(config.loss.kind)
    engine.model.train()
    for step, batch in zip(range(schedule.total_steps), batches, strict=False):
        engine.set_learning_rate(schedule.learning_rate(step))
        loss = criterion(engine.model(batch.images), batch.labels)
        engine.backward(loss)
        engine.step()
    return model.state_dict()


class ResidentData(TrainingData):
    """Training data that gives the same batches again and again."""

    def __init__(self, batches: Iterator[Batch], samples_per_epoch: int | None) -> None:
        self.batches, self.samples_per_epoch, self.class_names = batches, samples_per_epoch, None

    def fingerprint(self, data: DataConfig) -> dict[str, Any]:
        return {"order": "resident"}

    def describe(self) -> str:
        return "reading resident batches"

    def train_batches(self, config: Config, **options: Any) -> Iterator[Batch]:
        return self.batches

    def eval_batches(self, config: Config, **options: Any) -> Iterator[Batch]:
        raise NotImplementedError("nothing to evaluate on")


def train_with_loop(resolved: Resolved, world: World, folder: Path, batches: Iterator[Batch]) -> Weights:
    """The engine's own loop from its set-up to its export; the batches are all that is not as in a run."""
    run = RunFolder(folder)
    run.checkpoints.mkdir(parents=True)
    samples = resolved.config.data.train_samples
    start = Start(
        state=TrainerState(
            0,
            fingerprint={
                "model": resolved.config.model.model_dump(mode="json"),
                "global_batch_size": resolved.config.train.global_batch_size,
            },
        ),
        total_steps=Schedule(resolved.config, samples).total_steps,
        checkpoint=None,
        message="",
        data=ResidentData(batches, samples),
    )
    watchdog = Watchdog(run, world, resolved.config.watchdog)  # not entered: loops are blocked between their turns
    chosen = choose(resolved.config, machine_of(world))
    records, observers = Records(run), Observers(exporter=None)
    objective = build_objective(chosen.config, world.device, find_objective(chosen.config.train.objective))
    owned = (Ownership(), records, HeldCopies(Held(), world, lambda: Messages.open(60)))
    loop._train(resolved, chosen, run, start, world, watchdog, Preemption(), *owned, observers, objective, {})
    return load_file(folder / "model.safetensors")


def resident_batches(config: Config) -> list[Batch]:
    """Random images and labels, few enough to be learnt by heart."""
    size, pixels = config.train.global_batch_size, config.model.image_size
    generator = torch.Generator().manual_seed(0)
    return [
        Batch(
            images=torch.randint(0, 256, (size, pixels, pixels, 3), dtype=torch.uint8, generator=generator),
            labels=torch.randint(0, config.model.num_classes, (size,), generator=generator),
            weights=torch.ones(size),
            keys=[f"{batch:04d}-{sample:06d}" for sample in range(size)],
            seeds=np.arange(batch * size, (batch + 1) * size),
        )
        for batch in range(RESIDENT_BATCHES)
    ]


def describe_machine(command: str) -> dict[str, Any]:
    """Software and machine, and how busy the machine was before."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return collect_environment(
        command=command,
        cpu=next(line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        load_average=os.getloadavg(),  # over 1, 5 and 15 minutes
        threads=1,
        world_size=1,
        backend="gloo",
        precision="fp32",
    )


def summarize(result: Measurement) -> dict[str, Any]:
    config = result.case.resolve(0).config
    return {
        **asdict(result.case),
        "parameters": parameter_count(config.model),
        "log_every": config.train.log_every,
        "weight_difference": result.weight_difference,
        "milliseconds": result.milliseconds,
    }


def write(results: Mapping[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "step_overhead.json", json.dumps(results, indent=1) + "\n")
    atomic_write(folder / "step_overhead.md", render(results))


def render(results: Mapping[str, Any]) -> str:
    """The tables of `results`, as Markdown."""
    environment = results["environment"]
    versions, load = environment["versions"], environment["load_average"]
    lines = [
        "# The step loop's own cost",
        "",
        f"`{environment['command']}`, {environment['started']}: {environment['cpu']}, one thread, fp32, one process "
        f"(Gloo); Python {versions['python']}, PyTorch {versions['torch']}, DeepSpeed {versions['deepspeed']}; load "
        f"average {load[0]:.2f} of {environment['cpu_count']} cores at the start.",
        "",
        "All figures are medians over the rounds with their quartiles, and those to the right of `over` are of the "
        "differences and ratios between two turns of the same round. `deepspeed` over `bare` is DeepSpeed's share, "
        "`loop` over `deepspeed` is our own, and a figure that `control` (`bare` a second time) reaches too, or whose "
        "quartiles lie on both sides of zero, is the machine's noise.",
    ]
    for case in results["cases"]:
        lines += ["", f"## {case['name']}", "", *_describe(case), "", *_table(case["milliseconds"])]
    return "\n".join(lines) + "\n"


def _describe(case: Mapping[str, Any]) -> list[str]:
    every = "every step" if case["log_every"] == 1 else f"every {case['log_every']} steps"
    return [
        f"{case['parameters']:,} parameters; {case['rounds']} rounds of {case['turn_steps']} step(s) a variant; "
        f"`loop` logs {every}. After {case['warmup_steps'] + case['rounds'] * case['turn_steps'] + 1} steps from the "
        f"same start, no weight of any variant is further than {case['weight_difference']:.1e} from that of `bare`."
    ]


def _table(milliseconds: Mapping[str, Sequence[float]]) -> list[str]:
    rows = [
        "| variant | ms per step | quartiles | over | ms | quartiles | % | quartiles |",
        "|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    for variant, against in COMPARISONS:
        times = milliseconds[variant]
        row = [f"`{variant}`", f"{statistics.median(times):.2f}", _quartiles(times, ".2f")]
        if against is None:
            row += [""] * 5
        else:
            pairs = list(zip(times, milliseconds[against], strict=True))
            over, share = [a - b for a, b in pairs], [100 * (a / b - 1) for a, b in pairs]
            row += [f"`{against}`", f"{statistics.median(over):+.2f}", _quartiles(over, "+.2f")]
            row += [f"{statistics.median(share):+.1f}", _quartiles(share, "+.1f")]
        rows.append(f"| {' | '.join(row)} |")
    return rows


def _quartiles(values: Sequence[float], form: str) -> str:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{low:{form}} to {high:{form}}"


if __name__ == "__main__":
    main()
