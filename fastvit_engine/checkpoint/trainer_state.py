"""How far a run has come: what a checkpoint's manifest keeps of it besides tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, Field

from fastvit_engine.config import EvalTransform
from fastvit_engine.data.stream.skip import Window
from fastvit_engine.duration import BatchSizes

Figures = dict[str, float | int | None]  # of one evaluation: "top1", "loss", "samples"


@dataclass(frozen=True)
class Recovery:
    """What a run remembers of every time it went back to a checkpoint."""

    skipped: tuple[Window, ...] = ()  # positions of the data order that are left out from then on
    failed: tuple[Window, ...] = ()  # positions of the steps that failed, skipped or not
    rewinds: int = 0

    def merge(self, other: "Recovery") -> "Recovery":
        """All that either of them remembers; one of them is an earlier state of the other."""
        return Recovery(
            tuple(sorted({*self.skipped, *other.skipped})),
            tuple(sorted({*self.failed, *other.failed})),
            max(self.rewinds, other.rewinds),
        )

    def to_json(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "failed": self.failed, "rewinds": self.rewinds}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Recovery":
        """Raises ValueError, TypeError or KeyError if the content is not what `to_json` gave.

        Earlier manifests have `skipped` only.
        """
        skipped, failed = (_windows(content[key] if key == "skipped" else content.get(key, ())) for key in _WINDOWS)
        return cls(skipped, failed, _integer(content.get("rewinds", 0)))


@dataclass(frozen=True)
class Fp8State:
    """Which layers a run with `train.precision: fp8` computes in bf16 by now, and which may follow."""

    fallen: tuple[str, ...] = ()  # as "blocks.3.fc1"
    streaks: Mapping[str, int] = field(default_factory=dict)  # steps in a row with a scale out of range

    def to_json(self) -> dict[str, Any]:
        return {"fallen": self.fallen, "streaks": dict(self.streaks)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Fp8State":
        form = _Fp8Form.model_validate(content)
        return cls(tuple(form.fallen), form.streaks)


@dataclass(frozen=True)
class TrainerState:
    """A run after `step` optimizer steps."""

    step: int
    fingerprint: Mapping[str, Any]  # what a run must have in common with its checkpoints: "model", "seed", "data", ...
    seconds: float = 0.0  # of training, over restarts
    flops: float | None = None  # computed in training so far; None: nobody has counted them
    consumed: int = 0  # the position in the data order after the last sample trained on
    bad_samples: int = 0  # so far, without a usable image
    recent: tuple[tuple[float, float], ...] = ()  # loss and gradient norm of the last steps
    accuracy: Mapping[str, Figures] = field(default_factory=dict)  # by evaluation, from the last time
    evaluated_at: int | None = None  # the step of that time
    recovery: Recovery = Recovery()
    # "mean", "std", "eval_crop" and "eval_transform" of the images; None: unknown
    pixels: Mapping[str, Any] | None = None
    class_names: tuple[str, ...] | None = None  # in the order of the labels; None: unknown
    # (step, images per step from then on), see `BatchSizes`; empty: always the one of the fingerprint
    batch_sizes: tuple[tuple[int, int], ...] = ()
    init: Mapping[str, str] | None = None  # the weights that the run began with; None: from scratch
    fp8: Fp8State = Fp8State()

    @property
    def batches(self) -> BatchSizes:
        """The global batch of each step so far."""
        return BatchSizes(self.batch_sizes or ((0, self.fingerprint.get("global_batch_size", 1)),))

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "flops": self.flops,
            "consumed": self.consumed,
            **self.recovery.to_json(),
            "recent": self.recent,
            "bad_samples": self.bad_samples,
            "fingerprint": dict(self.fingerprint),
            "accuracy": dict(self.accuracy),
            "evaluated_at": self.evaluated_at,
            "pixels": None if self.pixels is None else dict(self.pixels),
            "class_names": self.class_names,
            "batch_sizes": self.batch_sizes,
            "init": None if self.init is None else dict(self.init),
            "fp8": self.fp8.to_json(),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "TrainerState":
        """Raises ValueError or TypeError if the content is not what this or an earlier version wrote."""
        _StateForm.model_validate(content)
        fingerprint, accuracy, evaluated_at = content["fingerprint"], content["accuracy"], content.get("evaluated_at")
        pixels, class_names = content.get("pixels"), content.get("class_names")
        return cls(
            step=_integer(content["step"]),
            fingerprint=fingerprint,
            seconds=float(content["seconds"]),
            flops=None if content.get("flops") is None else float(content["flops"]),
            consumed=_integer(content["consumed"]),
            bad_samples=_integer(content["bad_samples"]),
            recent=tuple((float(loss), float(norm)) for loss, norm in content["recent"]),
            accuracy=accuracy,
            evaluated_at=None if evaluated_at is None else _integer(evaluated_at),
            recovery=Recovery.from_json(content),
            pixels=pixels,
            class_names=None if class_names is None else tuple(class_names),
            batch_sizes=_batch_sizes(content.get("batch_sizes", ())),
            init=content.get("init"),
            fp8=Fp8State.from_json(content.get("fp8", {})),
        )


_Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
_Number = Annotated[float, Field(strict=True)]  # an integer is one, too


class _SourceForm(BaseModel):
    """One of the sources of data.train in a fingerprint, with what a start reads of it."""

    index: str
    lanes: Annotated[int, Field(strict=True, ge=1, lt=2**63)]
    weight: _Number


class _DataForm(BaseModel):
    """The order of the data in a fingerprint."""

    order: str
    sources: list[_SourceForm] = []


class _FingerprintForm(BaseModel):
    """What of a fingerprint is more than compared."""

    model: dict[str, Any]
    data: _DataForm | None = None


class _PixelsForm(BaseModel):
    """How images are prepared."""

    mean: tuple[_Number, _Number, _Number]
    std: tuple[_Number, _Number, _Number]
    eval_crop: _Number | None = None
    eval_transform: EvalTransform | None = None


class _Fp8Form(BaseModel):
    """An Fp8State as JSON."""

    fallen: list[str] = []
    streaks: dict[str, _Count] = {}


class _StateForm(BaseModel):
    """A TrainerState as JSON; keys that a later version may add are passed over."""

    step: _Count
    seconds: _Number
    flops: Annotated[_Number, Field(ge=0)] | None = None
    consumed: _Count
    bad_samples: _Count
    recent: list[tuple[_Number, _Number]]
    fingerprint: _FingerprintForm
    accuracy: dict[str, dict[str, Annotated[int, Field(strict=True)] | _Number | None]]
    evaluated_at: _Count | None = None
    pixels: _PixelsForm | None = None
    class_names: list[str] | None = None
    init: dict[str, str] | None = None
    fp8: _Fp8Form = _Fp8Form()


_WINDOWS = ("skipped", "failed")


def _windows(pairs: Any) -> tuple[Window, ...]:
    windows = tuple((_integer(first), _integer(last)) for first, last in pairs)
    if any(not 0 <= first < last for first, last in windows):
        raise ValueError("a window of samples is empty or negative")
    return windows


def _batch_sizes(pairs: Any) -> tuple[tuple[int, int], ...]:
    sizes = tuple((_integer(step), _integer(size)) for step, size in pairs)
    steps = [step for step, _ in sizes]
    if steps != sorted(set(steps)) or steps[:1] not in ([], [0]) or any(size < 1 for _, size in sizes):
        raise ValueError("the batch sizes are not those of rising steps from 0")
    return sizes


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is not an integer")
    return value
