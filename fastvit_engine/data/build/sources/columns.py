"""Which column of a table holds the images, which the labels, and which the split of each row."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from fastvit_engine.data.build.sources.context import Context
from fastvit_engine.data.shards.splits import Part, split_of
from fastvit_engine.errors import UserError
from fastvit_engine.shown import brief

PATH_COLUMNS = ("path", "url", "image", "file", "filename", "file_name", "image_path", "image_url")
BYTES_COLUMNS = ("image", "img", "jpg", "png", "bytes", "image_bytes")
SPLIT_COLUMNS = ("split", "subset", "partition")
_MOST_SHOWN = 40  # names
LABEL_COLUMNS = ("label", "labels", "class", "classes", "class_name", "cls", "target", "targets", "fine_label")


class NoColumn(UserError):
    """A table has no column that could hold what is looked for."""


def image_column(names: Sequence[str], usual: Sequence[str], where: str, context: Context) -> str:
    """The column of images: the one that --image-column names, or the only one of the `usual` names.

    Raises UserError if there is none or more than one.
    """
    context.column_options.add("--image-column")
    return _only(names, usual, context.image_column, "--image-column", "images", where)


def label_column(names: Sequence[str], usual: Sequence[str], where: str, context: Context) -> str:
    """The column of labels: the one that --labels or --label-column names, or the only one of the `usual` names.

    Raises UserError if there is none or more than one.
    """
    context.column_options.add("--label-column")
    return _only(names, usual, context.labels or context.label_column, "--label-column", "labels", where)


def _only(names: Sequence[str], usual: Sequence[str], wanted: str | None, option: str, what: str, where: str) -> str:
    present = [name for name in names if name.strip()]  # the index that pandas writes has no name
    if wanted is not None:
        found = [name for name in present if wanted in (name, name.strip())]
    else:
        found = [name for name in present if name in usual or name.strip().lower() in usual]
    if len(found) == 1:
        return found[0]
    if len(found) > 1:
        choices = " or ".join(f"{option} {name}" for name in dict.fromkeys(found))
        raise UserError(
            f"{where} has {len(found)} columns that may hold the {what}: "
            + (f"choose with {choices}" if len(set(found)) > 1 else f"rename all but one of those called '{found[0]}'")
        )
    called = f"of {what}" if wanted is None else f"called '{wanted}'"
    raise NoColumn(f"{where} has no column {called}, only {_listed(present)}: name it with {option}")


def _listed(names: Sequence[str]) -> str:
    """Names for a sentence, which holds only so much."""
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return ", ".join(brief(name, 60) for name in names[:_MOST_SHOWN]) + more


def split_column(names: Sequence[str]) -> str | None:
    """The column that may say the split of each row."""
    return next((name for name in names if name.strip().lower() in SPLIT_COLUMNS), None)


@dataclass(frozen=True)
class RowSplits:
    """What a column says of the rows: to train on, to evaluate on, or neither."""

    parts: dict[str, Part]  # by what stands in the column

    @property
    def held_out(self) -> Part | None:
        """The part to evaluate on; None if all rows are of one part, and all are taken."""
        present = set(self.parts.values())
        return None if len(present) < 2 else "val" if "val" in present else "test"

    def is_held_out(self, value: str) -> bool:
        return self.held_out is not None and self.parts[value] == self.held_out

    def is_left_out(self, value: str) -> bool:
        """Whether a row is of the test split although there is a validation split."""
        return self.held_out is not None and self.parts[value] not in ("train", self.held_out)


ROW_LEFT_OUT = "row of the test split (there is a validation split)"


def row_splits(column: str, values: Collection[str], where: str) -> RowSplits | None:
    """The splits that the distinct values of a column name; None if the column is about something else.

    An empty value names none. Raises UserError if a column called "split" has other values, or none means training.
    """
    parts = {value: part for value in values if value and (part := split_of(value, folder=True))}
    other = next((value for value in sorted(values) if value and value not in parts), None)
    if other is not None or not parts:
        if column.strip().lower() != "split":
            return None
        problem = f"has '{other[:200]}'" if other else "is empty"
        raise UserError(
            f"the column '{column}' of {where} {problem}, and splits are called train, val and test: correct it, or "
            "rename the column if it means something else"
        )
    splits = RowSplits(parts)
    if splits.held_out is not None and "train" not in parts.values():
        raise UserError(
            f"the column '{column}' of {where} says val and test, and never train: write the rows to train on, and "
            "those to evaluate on, into a list each, and name the second one with --eval-source"
        )
    return splits
