"""How a run is saved, sharded over processes, kept healthy and watched."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from fastvit_engine.config.sections.base import MONTH, Section, distinct
from fastvit_engine.duration import Duration

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class CheckpointConfig(Section):
    """Which checkpoints are written, where, and which of them are kept."""

    every: Duration | None = "5000 steps"
    """Interval between checkpoints; null: only at the end of the run, where one is always written."""

    keep: int = Field(2, gt=0)
    """Number of most recent checkpoints to keep."""

    keep_every: Duration | None = None
    """Also keep the first checkpoint at or after each multiple of this interval; null: none."""

    keep_best: (
        Literal["eval.top1", "eval.top5", "eval.loss", "eval_ema.top1", "eval_ema.top5", "eval_ema.loss"] | None
    ) = None
    """Also keep the checkpoint with the best value of this evaluation metric; null: none."""

    path: str | None = None
    """Folder or URL for checkpoints, such as s3://bucket/run; null: checkpoints/ in the run folder."""

    in_memory: Literal["auto"] | bool = "auto"
    """Copy the state to host memory after each step, so that a process that is killed costs no more: `fastvit train`
    on one machine keeps two copies and restarts its processes from them. auto: on CPUs, if a quarter of the free memory
    holds the copies. true, with torchrun on several nodes: a node's copies are also in the memory of the next node, so
    that a lost node costs no more."""


class ZeroConfig(Section):
    """DeepSpeed ZeRO: what is sharded over the processes, and what is kept in host memory."""

    stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """0: nothing is sharded; 1: optimizer states; 2: gradients too; 3: parameters too; auto: the fastest stage that
    fits, see `fastvit plan`."""

    offload: Literal["none", "optimizer", "all"] = "none"
    """What is kept in host memory. optimizer: its states, from stage 1 on; all: parameters too, in stage 3 only."""


class HealthConfig(Section):
    """When training returns to its last checkpoint. A loss, gradient or weight that is not finite always causes it."""

    spike_threshold: float | None = Field(20.0, gt=0, le=1e9)
    """A loss or gradient norm above median + spike_threshold x max(MAD, floor) of the last spike_window steps is a
    spike and rewinds the run (MAD: median absolute deviation); null: spikes are ignored."""

    spike_window: int = Field(100, ge=10, le=100_000)
    """Number of steps whose median and MAD are used. Detection starts after as many steps."""

    max_rewinds: int = Field(3, ge=0)
    """Most rewinds of the whole run. One more aborts it."""

    compare_replicas_every: int | None = Field(100, gt=0)
    """Steps between checks that all processes hold identical weights; null: only before each checkpoint."""

    watch_gradients: bool = False
    """Check each process's own gradients in every step, which names the rank at fault even if the fault never repeats.
    Costs a small reduction per parameter and micro-batch. false: only after a fault whose rank is unknown."""


class WatchdogConfig(Section):
    """When processes stop waiting for each other and exit for a restart, and which of them are reported as slow."""

    timeout_seconds: float = Field(300.0, ge=1, le=MONTH)
    """Exit after this many seconds without progress on any process, during training and evaluation."""

    slow_phase_seconds: float = Field(1800.0, ge=1, le=MONTH)
    """The same limit while starting, in the first step, and while saving."""

    slow_rank_ratio: float = Field(1.5, gt=1, le=1e6)
    """A process is slow if its own work takes more than this many times the median process's."""

    slow_rank_laps: int = Field(3, gt=0)
    """Consecutive measurements, at least five seconds apart, in which a process must be slow to be reported."""


class ObserveConfig(Section):
    """How a run can be watched while it trains, besides its log and the files of its folder."""

    trackers: Annotated[tuple[TrackerName, ...], AfterValidator(distinct)] = ("tensorboard",)
    """Programs that draw the metrics, such as [tensorboard, wandb]; [] for none. All but tensorboard are packages of
    their own: pip install 'fastvit-engine[wandb]'."""

    project: str = Field("fastvit", min_length=1)
    """Project of wandb and trackio, and experiment of mlflow, in which the run appears under the name of its folder."""

    prometheus_port: int | None = Field(None, gt=0, lt=65536)
    """Port at which rank 0 serves the metrics to Prometheus; null: none. Needs pip install
    'fastvit-engine[prometheus]'."""

    prometheus_host: str = "127.0.0.1"
    """Address of that port. The default lets only this machine connect; 0.0.0.0: every machine that can reach it."""
