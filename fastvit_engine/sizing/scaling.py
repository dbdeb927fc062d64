"""The same run on 1 to 512 devices: how fast each number of them is, and what communication costs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastvit_engine.config import Config
from fastvit_engine.data.stream.batch_split import split_batch
from fastvit_engine.errors import UserError
from fastvit_engine.sizing.defaults import choose
from fastvit_engine.sizing.machine import Machine
from fastvit_engine.sizing.step_time import Speed, StepTime, step_time

MOST = 512


@dataclass(frozen=True)
class Point:
    """One number of devices. step: None, and why, if it cannot train the recipe."""

    processes: int
    nodes: int
    step: StepTime | None
    zero_stage: int | None = None
    images_per_second: float = 0.0
    efficiency: float = 0.0  # of what as many devices would do that send nothing
    problem: str = ""

    @property
    def is_alone(self) -> bool:
        """One device sends nothing, so its speed is as good as the figure that it comes from."""
        return self.processes == 1


def scaling(config: Config, machine: Machine, speed: Speed, work: float = 1.0) -> list[Point]:
    """By powers of two, and the number of `machine`. Nodes have as many devices as those of `machine`.

    work: as in `step_time`.
    """
    sizes = {2**power for power in range(MOST.bit_length())} | {machine.processes}
    per_node = machine.processes_per_node
    return [
        _point(config, replace(machine, processes=size, processes_per_node=min(per_node, size)), speed, work)
        for size in sorted(sizes)
        if size <= per_node or size % per_node == 0
    ]


def _point(config: Config, machine: Machine, speed: Speed, work: float) -> Point:
    nodes = machine.processes // machine.processes_per_node
    try:
        chosen = choose(config, machine)
    except UserError as error:
        return Point(machine.processes, nodes, None, problem=str(error))
    step = step_time(chosen, speed, work)
    rate = config.train.global_batch_size / step.total
    stage = chosen.config.zero.stage
    assert stage != "auto"
    split = split_batch(chosen.config, machine.processes)
    efficiency = split.global_batch_size / machine.processes / split.images_computed(0) * step.computing / step.total
    return Point(machine.processes, nodes, step, stage, rate, efficiency)


def as_rows(points: Sequence[Point], *, measured: bool) -> list[dict[str, object]]:
    """Plain JSON. measured: whether a device's own speed is."""
    return [
        {
            "gpus": point.processes,
            "nodes": point.nodes,
            "zero_stage": point.zero_stage,
            "images_per_second": point.images_per_second,
            "efficiency": point.efficiency,
            "exposed_seconds": point.step.exposed,
            "step_seconds": point.step.total,
            "is": "measured" if measured and point.is_alone else "modelled",
        }
        if point.step is not None
        else {"gpus": point.processes, "nodes": point.nodes, "problem": point.problem}
        for point in points
    ]
