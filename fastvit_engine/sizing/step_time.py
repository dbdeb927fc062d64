"""How long a training step takes: what a device computes, as measured or assumed, and what communication adds to it."""

from collections.abc import Iterable
from dataclasses import dataclass

from fastvit_engine.config import Config
from fastvit_engine.config.model_shape import tokens_in_training
from fastvit_engine.data.stream.batch_split import split_batch
from fastvit_engine.models import run_flops
from fastvit_engine.models.flops import recomputed_flops
from fastvit_engine.sizing.activations import checkpointed_blocks
from fastvit_engine.sizing.communication import Library, Network
from fastvit_engine.sizing.compute import ImageTime, assumed_of_gpu
from fastvit_engine.sizing.defaults import Chosen
from fastvit_engine.sizing.interconnects import Interconnect, usual
from fastvit_engine.sizing.machine import Machine
from fastvit_engine.sizing.traffic import Compute, Event, Send, Settings, step_events

# Of the time of both passes: the backward pass has two products for each of the forward pass.
_FORWARD = 1 / 3


@dataclass(frozen=True)
class StepTime:
    """Seconds, messages and bytes of one step."""

    computing: float  # of the process that has the most images
    communicating: float  # in all
    exposed: float  # of it, while nothing is computed
    messages: int
    sent_bytes: float  # by each process

    @property
    def total(self) -> float:
        return self.computing + self.exposed

    @property
    def hidden(self) -> float:
        """Communication behind computation."""
        return self.communicating - self.exposed


@dataclass(frozen=True)
class Speed:
    """What decides how fast a job is: its devices, and what is between them."""

    image: ImageTime
    interconnect: Interconnect

    def network(self, machine: Machine) -> Network:
        library: Library = "nccl" if machine.on_gpu else "gloo"
        return Network(machine.processes, machine.processes_per_node, self.interconnect, library)


def usual_speed(config: Config, gpu: str, mfu: float) -> Speed:
    """What is assumed of a GPU if nobody says anything."""
    return Speed(assumed_of_gpu(config, gpu, mfu), usual(gpu))


def step_time(chosen: Chosen, speed: Speed, work: float = 1.0) -> StepTime:
    """Of a run as it is chosen. Processes with the most images set the pace.

    work: what an image takes to compute, as a share of what a whole one takes; see section `tokens` of a configuration.
    """
    machine = chosen.machine
    split = split_batch(chosen.config, machine.processes)
    steps = split.accumulation_steps
    settings = Settings.of(chosen.config, machine.processes, machine.processes_per_node, steps)
    image = work * speed.image.seconds * _with_recomputation(chosen.config)
    micro_batch = image * split.images_computed(0) / steps
    return play(step_events(chosen.config, settings), speed.network(machine), micro_batch)


def _with_recomputation(config: Config) -> float:
    """How many times as much is computed with activation checkpointing."""
    again = recomputed_flops(tokens_in_training(config), config.model, checkpointed_blocks(config))
    return 1 + again / run_flops(config).computed


def images_per_second(chosen: Chosen, speed: Speed, work: float = 1.0) -> float:
    return chosen.config.train.global_batch_size / step_time(chosen, speed, work).total


def play(events: Iterable[Event], network: Network, micro_batch: float) -> StepTime:
    """Goes through a step. micro_batch: seconds that its forward and backward pass compute.

    Messages follow each other; where several are on their way, they share the bandwidth, and the latencies are those of
    the slowest. Those that nobody waits for travel while the device computes, at no cost to it.
    """
    now = computing = communicating = carried = sent_bytes = 0.0
    arrivals: list[float] = []
    lanes = [0.0] * network.at_once  # when each has delivered its last message
    for event in events:
        if isinstance(event, Compute):
            taken = micro_batch * event.share * (_FORWARD if event.forward else 1 - _FORWARD)
            computing += taken
            now += taken
        elif isinstance(event, Send):
            taken, start = network.seconds(event.message), max(now, min(lanes))
            carried = max(carried, start) + network.moving_seconds(event.message)
            arrived = max(start + taken, carried)
            lanes[lanes.index(min(lanes))] = arrived
            communicating += taken
            sent_bytes += network.wire_bytes(event.message)
            arrivals.append(arrived)
            if event.waits:
                now = arrived
        else:
            now = max(now, arrivals[event.message])
    return StepTime(computing, communicating, max(now, *lanes) - computing, len(arrivals), sent_bytes)
