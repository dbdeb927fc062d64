"""What a tracker is, and which numbers of a row it takes."""

from typing import Protocol, cast

from fastvit_engine.observe.metrics import FewShotRow, OwnRow, Row


class Tracker(Protocol):
    """Takes every row that `metrics.jsonl` gets, in the same order. One process of a job has trackers."""

    def __str__(self) -> str:
        """What it writes to."""

    def write(self, row: Row) -> None:
        """Takes the numbers of one row. Raises OSError if it cannot take this and further ones."""

    def close(self) -> None:
        """Writes out what it still holds."""


def numbers_of(row: Row) -> dict[str, float]:
    """The numbers of a row but its step, by name: "train/loss", "eval/top1", "fewshot/5-shot"."""
    group = row.get("eval", "train")
    numbers = {
        f"{group}/{key}": value for key, value in row.items() if isinstance(value, int | float) and key != "step"
    }
    shots = cast(FewShotRow, row)["shots"] if "shots" in row else {}
    figures = cast(OwnRow, row)["figures"] if "figures" in row else {}
    numbers |= {f"{group}/{name}": number for name, number in figures.items()}
    return numbers | {f"{group}/{number}-shot": found["mean"] for number, found in shots.items()}
