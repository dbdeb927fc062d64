"""What watches a run besides its log: the trackers of its figures, and the port for Prometheus."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from fastvit_engine.config.sections import ObserveConfig
from fastvit_engine.distributed.world import World
from fastvit_engine.observe import prometheus
from fastvit_engine.observe.prometheus import Exporter, HostFigures
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.observe.trackers import choose
from fastvit_engine.observe.trackers.protocol import Tracker
from fastvit_engine.shown import recorded
from fastvit_engine.train.job import Job


def check_installed(config: ObserveConfig) -> None:
    """Raises UserError, with what to install, if a package that the settings need is missing."""
    choose.check_installed(config.trackers)
    prometheus.check_installed(config.prometheus_port)


@dataclass(frozen=True)
class Observers:
    """Those of rank 0, while the run lasts."""

    exporter: Exporter | None

    def trackers(self, job: Job, start_step: int) -> list[Tracker]:
        """New trackers for training that starts at `start_step`, and the exporter, which stays."""
        observe, total = job.config.observe, job.schedule.total_steps
        public = recorded(job.config.model_dump(mode="json"))
        opened = choose.open_trackers(observe.trackers, job.run, observe.project, public, start_step, total)
        if self.exporter is None:
            return opened
        self.exporter.total_steps, self.exporter.hosts = total, lambda: _host_figures(job)
        return [*opened, self.exporter]


@contextmanager
def observed(config: ObserveConfig, run: RunFolder, world: World) -> Iterator[Observers]:
    """What watches the run during the block, on rank 0. Collective, also in its errors.

    Raises UserError if a package is missing or the port cannot be used.
    """
    with ExitStack() as stack:
        exporter = Exporter(run.name) if world.is_main and config.prometheus_port is not None else None

        def begin() -> None:
            check_installed(config)
            if exporter is not None and config.prometheus_port is not None:
                stack.enter_context(prometheus.served(exporter, config.prometheus_host, config.prometheus_port))

        world.on_main(begin)
        yield Observers(exporter)


def _host_figures(job: Job) -> list[HostFigures]:
    shares = job.processes.stragglers.work_shares
    of_hosts = defaultdict(list)
    for status, silent in job.processes.watchdog.last_heard:
        share = shares[status.rank] if status.rank < len(shares) else None
        of_hosts[status.host].append(HostFigures(status.host, status.step or 0, silent, share))
    return [
        HostFigures(
            host,
            min(one.step for one in ranks),
            max(one.silent_seconds for one in ranks),
            max((one.work_share for one in ranks if one.work_share is not None), default=None),
        )
        for host, ranks in of_hosts.items()
    ]
