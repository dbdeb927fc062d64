"""Which layers leave FP8: those whose scales are out of range in many steps in a row.

Every process learns of the layers of all processes from the guard's sum, so all of them decide alike. What is decided,
and how many steps each layer has counted, is in every checkpoint: a resumed run decides as if it had not stopped.
"""

from collections.abc import Sequence

from fastvit_engine.checkpoint.trainer_state import Fp8State
from fastvit_engine.models.fp8 import Fp8Layers
from fastvit_engine.observe.units import counted


class Fp8Fallback:
    """Counts, for each layer in FP8, the steps in a row in which some process met a scale out of range."""

    def __init__(self, layers: Fp8Layers, after: int | None) -> None:
        self.layers, self._after = layers, after
        self._fallen: list[str] = []
        self._streaks: dict[str, int] = {}

    def restore(self, state: Fp8State) -> None:
        """Training starts, or goes back to where this was so. Layers that the model no longer has are dropped."""
        known = set(self.layers.names)
        self._fallen = [name for name in state.fallen if name in known]
        self._streaks = {name: steps for name, steps in state.streaks.items() if name in known}
        self.layers.leave(self._fallen)

    @property
    def state(self) -> Fp8State:
        return Fp8State(tuple(self._fallen), dict(self._streaks))

    def step_done(self, overflows: Sequence[float]) -> tuple[str, ...]:
        """The layers that leave FP8 after this step, on every process.

        overflows: the sum over processes of what `layers.take_overflows` gave.
        """
        met = self.layers.named(overflows).difference(self._fallen)
        streaks = {name: self._streaks.get(name, 0) + 1 for name in self.layers.names if name in met}
        leaving = () if self._after is None else tuple(name for name, n in streaks.items() if n >= self._after)
        self._streaks = {name: steps for name, steps in streaks.items() if name not in leaving}
        if leaving:
            self._fallen += leaving
            self.layers.leave(self._fallen)
        return leaving

    def describe(self, leaving: Sequence[str], step: int) -> str:
        """What has happened after so many steps, as a sentence."""
        assert self._after is not None
        which = f"{leaving[0]} leaves" if len(leaving) == 1 else f"{', '.join(leaving)} leave"
        return (
            f"{which} FP8 after step {step} and continue{'s' if len(leaving) == 1 else ''} in bf16: scales were out of "
            f"range in {counted(self._after, 'step')} in a row ({len(self.layers.names) - len(self._fallen)} of "
            f"{counted(len(self.layers.names), 'layer')} stay in FP8)"
        )
