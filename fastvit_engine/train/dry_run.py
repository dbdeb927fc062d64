"""What `--dry-run` does: checks all of a run that can be checked without starting it, and says what a start would do.

Nothing is written: an index that is missing is made in a temporary folder, remote shards are read past their cache, and
the owner of the run folder is only looked at.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fastvit_engine.checkpoint import store_of
from fastvit_engine.checkpoint.local import LocalStore
from fastvit_engine.checkpoint.owner import check_unowned
from fastvit_engine.checkpoint.records import Records
from fastvit_engine.config import Config, Resolved
from fastvit_engine.config.sections import DataConfig, ObserveConfig
from fastvit_engine.cores import cores_here
from fastvit_engine.data.shards.names import is_local
from fastvit_engine.data.stream.indexed import IndexedData
from fastvit_engine.errors import UserError
from fastvit_engine.observe import prometheus
from fastvit_engine.observe.disk import check_writable
from fastvit_engine.observe.run_folder import WORKING_FOLDERS, RunFolder
from fastvit_engine.observe.trackers import choose as trackers
from fastvit_engine.observe.units import counted
from fastvit_engine.sizing.defaults import Chosen, choose
from fastvit_engine.sizing.gpus import GPU_MEMORY_GIB, USUAL_MFU, known_gpu
from fastvit_engine.sizing.machine import Machine, device_memory
from fastvit_engine.sizing.step_time import usual_speed
from fastvit_engine.train.estimate import describe_split, describe_time, training_time
from fastvit_engine.train.first_weights import fill_in
from fastvit_engine.train.start import DryRun, Start, check_profile, preflight


@dataclass(frozen=True)
class Target:
    """The processes that a run would have. A job that can shrink and grow has two numbers of them.

    gpu: of other machines than this one, as datasheets call it; None: the run would be on this machine's devices.
    """

    processes: tuple[int, ...]  # the largest number first
    per_node: int
    gpu: str | None = None

    @property
    def on_gpu(self) -> bool:
        return self.gpu is not None or torch.cuda.is_available()

    def machine(self, processes: int) -> Machine:
        per_node = min(self.per_node, processes)
        memory = self._memory(per_node)
        cores = None if self.gpu is not None else cores_here() // per_node
        return Machine(processes, per_node, memory, self.on_gpu, cores)

    def _memory(self, per_node: int) -> int:
        if self.gpu is not None:
            return GPU_MEMORY_GIB[self.gpu] * 2**30
        return device_memory(per_node, on_gpu=self.on_gpu)

    @property
    def gpu_name(self) -> str | None:
        """As datasheets call it; None for a CPU, and for a GPU that is in no table."""
        if self.gpu is not None or not self.on_gpu:
            return self.gpu
        return known_gpu(torch.cuda.get_device_name())

    def describe(self) -> str:
        """The job, on one line."""
        sizes = " to ".join(str(size) for size in sorted(self.processes))
        nodes = " to ".join(str(-(-size // self.per_node)) for size in sorted(self.processes))
        jobs = f"{sizes} process{'' if sizes == '1' else 'es'} on {nodes} node{'' if nodes == '1' else 's'}"
        if self.gpu is not None:
            return f"{jobs}, one {self.gpu} ({GPU_MEMORY_GIB[self.gpu]} GiB) each, as assumed"
        if self.on_gpu:
            return f"{jobs}, one {torch.cuda.get_device_name()} each, as on this machine"
        return f"{jobs}, on CPU cores, as on this machine"


def dry_run(resolved: Resolved, run: RunFolder, target: Target, *, resume: bool, allow_batch_change: bool) -> str:
    """Checks a run and returns what a start would do, for people. Raises UserError for what would be refused."""
    with tempfile.TemporaryDirectory(prefix="fastvit-dry-run-") as folder:
        scratch = Path(folder)
        _check_folders(resolved.config, run)
        doubts = check_unowned(resolved.config.checkpoint, run)
        doubts += _check_observers(resolved.config.observe, run, target)
        records = run
        if run.url is not None:  # the truth about it is in the store, and not in the working folder
            records = RunFolder(scratch / "run", run.url)
            Records(records).fetch()
        filled = fill_in(resolved, records, resume=resume)
        resolved = filled.apply(resolved)
        chosen = [choose(resolved.config, target.machine(processes)) for processes in target.processes]
        trial = DryRun(target.on_gpu, scratch)
        starts = []
        for one in chosen if resolved.config.data.order == "stream" else chosen[:1]:
            config = _past_the_cache(one.config)
            processes = one.machine.processes
            check = partial(preflight, config, records, processes, resume=resume, dry_run=trial)
            starts.append(check(allow_batch_change=allow_batch_change))
        start = starts[0]
        if start.step < start.total_steps:
            for processes in target.processes:
                check_profile(resolved.config.train.profile, start.total_steps, processes)
        doubts += _check_cache(chosen[0].config.data, start, here=target.gpu is None)
        made = sorted(path.stem for path in scratch.glob("*.index") if not path.name.startswith("remote-"))
        warnings = (*start.damaged, *start.warnings, *filled.doubts(start.data.class_names), *doubts)
        lines = [
            f"dry run, nothing is written: {target.describe()}",
            start.message.replace(str(records.path), str(run.path)),
        ]
        lines += [f"  {fact}" for fact in _facts(start, chosen[0].config, made, filled.notes)]
        lines += [f"warning: {text}" for text in warnings]
        if start.step < start.total_steps:
            lines += _plan(chosen, target, start)
        return "\n".join(lines)


def _past_the_cache(config: Config) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"cache": None, "cache_gb": None})})


def _check_folders(config: Config, run: RunFolder) -> None:
    """Raises UserError if a place that a run writes to cannot be written to, as far as that can be told."""
    if run.url is None:
        check_writable(run.path, f"run folder {run.path}", instead="one with --out")
    else:
        check_writable(run.path, f"working folder {run.path}", instead=f"folder with {WORKING_FOLDERS}")
    store = store_of(config.checkpoint, run)
    if config.checkpoint.path is not None and isinstance(store, LocalStore):
        check_writable(store.folder, str(store.folder), instead="checkpoint.path")


def _check_cache(data: DataConfig, start: Start, *, here: bool) -> tuple[str, ...]:
    """Raises UserError if the cache of remote shards cannot be written; if the run is elsewhere, returns that."""
    if data.cache is None or not isinstance(start.data, IndexedData):
        return ()
    if all(is_local(shard) for source in start.data.train for shard in source.data.shards):
        return ()
    try:
        check_writable(Path(data.cache).expanduser(), f"shard cache folder {data.cache}", instead="data.cache")
    except UserError as error:
        if here:
            raise
        return (f"on this machine, {error}; each node needs it",)
    return ()


def _check_observers(config: ObserveConfig, run: RunFolder, target: Target) -> tuple[str, ...]:
    """Raises UserError if a package is missing or the port is taken; if another machine needs them, returns that."""
    elsewhere = target.gpu is not None or target.processes[0] > target.per_node
    try:
        trackers.check_installed(config.trackers)
        prometheus.check_installed(config.prometheus_port)
        if config.prometheus_port is not None:  # open for a moment
            with prometheus.served(prometheus.Exporter(run.name), config.prometheus_host, config.prometheus_port):
                pass
    except UserError as error:
        if not elsewhere:
            raise
        return (f"on this machine, {error}; the node of rank 0 needs it",)
    return ()


def _facts(start: Start, config: Config, made: Sequence[str], notes: Sequence[str]) -> list[str]:
    facts = []
    if isinstance(start.data, IndexedData) and start.data.eval is not None:
        held_out = start.data.eval
        shards = counted(len(held_out.shards), "shard")
        facts.append(f"evaluation data: {counted(held_out.open().samples, 'sample')} in {shards}")
    if start.few_shot is not None:
        facts.append("few-shot data: readable")
    if start.data.class_names is not None and config.model.num_classes:
        facts.append(f"classes: {len(start.data.class_names)}, and model.num_classes = {config.model.num_classes}")
    if start.checkpoint is not None:
        facts.append(f"resumes from {start.checkpoint}")
    elif config.init.from_ is not None:
        facts.append(f"first weights: {config.init.from_}, head {config.init.head}; their header fits")
    if made:
        facts.append(
            f"no index for {' and '.join(made)} shards: made for this check and dropped; a start makes it again, or "
            "`fastvit data index` once for all"
        )
    return [*facts, *notes]


def _plan(chosen: Sequence[Chosen], target: Target, start: Start) -> list[str]:
    """Memory, settings and time on the largest number of processes, and the split on the others."""
    lines = [chosen[0].describe()]
    gpu, samples = target.gpu_name, start.data.samples_per_epoch
    lines += [describe_split(one) for one in chosen]
    if gpu is not None:
        speed = usual_speed(chosen[0].config, gpu, USUAL_MFU)
        lines += describe_time(training_time(chosen[0], speed, samples), speed, chosen[0])
    else:
        device = "this GPU is in no table of peaks" if target.on_gpu else "a CPU's speed is measured only by training"
        lines.append(f"time          unknown: {device}")
    return lines
