"""The floating-point operations that the steps of a run take, by its phases."""

from collections.abc import Sequence
from functools import cached_property

from fastvit_engine.config import Config
from fastvit_engine.config.phases import Phase, Phases
from fastvit_engine.data.stream.batch_split import BatchSplit
from fastvit_engine.models import run_flops
from fastvit_engine.models.flops import RunFlops


class Compute:
    """Counts the operations of a run's steps. split: of its batch over processes; None: nobody knows it yet."""

    def __init__(self, config: Config, split: BatchSplit | None = None) -> None:
        self._config, self._split = config, split
        self._known: dict[Phase, RunFlops] = {}

    def per_image(self, phase: Phase) -> RunFlops:
        """Of an image, forward and backward."""
        cost = phase._replace(first_step=0)
        if cost not in self._known:
            self._known[cost] = run_flops(self._config, cost, micro_batches=self._micro_batches)
        return self._known[cost]

    def of_steps(self, phases: Phases, first: int, last: int) -> RunFlops:
        """Of the steps from `first` to before `last`, of all processes together."""
        counted = [(steps, self.per_image(phase)) for phase, steps in phases.spans(first, last)]
        batch = self._config.train.global_batch_size
        return RunFlops(
            batch * sum(steps * flops.whole for steps, flops in counted),
            batch * sum(steps * flops.computed for steps, flops in counted),
        )

    def mean_per_image(self, phases: Phases, total_steps: int) -> RunFlops:
        """Of an image, on average over the run."""
        return self.mean_of(phases.spans(0, total_steps))

    def mean_of(self, spans: Sequence[tuple[Phase, int]]) -> RunFlops:
        """Of an image, on average over phases with so many steps each."""
        steps = sum(count for _, count in spans)
        whole, computed = (
            sum(count * self.per_image(phase)[kind] for phase, count in spans) for kind in range(len(RunFlops._fields))
        )
        return RunFlops(round(whole / steps), round(computed / steps))

    @cached_property
    def _micro_batches(self) -> tuple[int, ...] | None:
        """Images in each pass of each process; None where it does not matter."""
        if self._split is None or self._config.model.drop_path_mode == "mask":
            return None
        return tuple(size for rank in range(self._split.world_size) for size in self._split.micro_batches(rank))
