"""Which column of a table holds the images, and which the labels."""

from collections.abc import Sequence

from fastvit_engine.data.build.sources.context import Context
from fastvit_engine.errors import UserError

PATH_COLUMNS = ("path", "url", "image", "file", "filename", "file_name", "image_path", "image_url")
BYTES_COLUMNS = ("image", "img", "jpg", "png", "bytes", "image_bytes")
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
    raise NoColumn(f"{where} has no column {called}, only {', '.join(present)}: name it with {option}")
