"""What a run needs besides its devices: storage for checkpoints, bytes of shards per second, cores that decode."""

from dataclasses import dataclass

from fastvit_engine.config import Config
from fastvit_engine.engine.optimizers.state import STATE_BYTES
from fastvit_engine.sizing.parameters import ParameterCounts

SAVED_WITHIN = 60.0  # seconds: in which a save should end, so that little is lost if a node fails meanwhile
# `fastvit` in benchmarks/results/cpu/data-2026-11-29.md, 2 workers, 224 pixels, a core of an AMD EPYC: mean bytes of a
# sample, and images per CPU-second, reading, cropping and all.
DECODED = ((35_000, 1_655), (105_000, 771))
DECODED_FROM = "benchmarks/results/cpu/data-2026-11-29.md, a core of an AMD EPYC"
USUAL_SAMPLE = 105_000  # bytes: photos as they are, in the same record


@dataclass(frozen=True)
class Needs:
    """Of the whole job."""

    checkpoint_bytes: int
    write_bytes_per_second: float  # for a save to end within SAVED_WITHIN
    read_bytes_per_second: float
    decoding_cores: float


def needs_of(config: Config, images_per_second: float, sample_bytes: float) -> Needs:
    """At so many images per second, of samples of so many bytes each."""
    size = checkpoint_bytes(config)
    reading = images_per_second * sample_bytes
    return Needs(size, size / SAVED_WITHIN, reading, images_per_second * decoding_seconds(sample_bytes))


def checkpoint_bytes(config: Config) -> int:
    """The fp32 weights, what the optimizer keeps of those that learn, and the moving average."""
    counts = ParameterCounts.of_run(config)
    optimizer = config.optimizer
    kept = sum(STATE_BYTES[optimizer.kind](optimizer, name, shape) for name, shape in counts.learning_shapes)
    average = 4 * counts.parameters if config.ema.decay is not None else 0
    return 4 * counts.parameters + kept + average


def decoding_seconds(sample_bytes: float) -> float:
    """CPU seconds per image, on a line through the measurements; no less than for the smaller of them."""
    (small, fast), (large, slow) = DECODED
    share = max(0.0, (sample_bytes - small) / (large - small))
    return 1 / fast + share * (1 / slow - 1 / fast)
