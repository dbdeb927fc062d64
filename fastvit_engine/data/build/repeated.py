"""Running the command again that writes a folder of shards: whether it asks for the same, and what is there of it."""

from typing import Any

from fastvit_engine.data.shards.names import INFO_NAME, DatasetInfo
from fastvit_engine.data.shards.remote_path import AnyPath
from fastvit_engine.errors import UserError
from fastvit_engine.shown import recorded


def check_equal(out: AnyPath, tense: str, before: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Raises UserError if a folder that "was" or "is being" made was asked for with other arguments."""
    for name, value in arguments.items():
        if name in before and recorded(before[name]) != recorded(value):
            raise UserError(
                f"{out} {tense} made {_option(name, before[name])}, not {_option(name, value)}: remove the folder "
                "or choose another --out"
            )


def check_whole(out: AnyPath, made: DatasetInfo) -> None:
    """Raises UserError if a shard of a finished data set is gone."""
    present = {file.name for file in out.iterdir()}
    missing = sorted((made.train.shards.keys() | made.eval.shards.keys()) - present)
    if missing:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise UserError(
            f"{out} was made, but {missing[0]}{more}, which its {INFO_NAME} lists, does not exist: copy it there, or "
            "remove the folder and make it again"
        )


def _option(name: str, value: Any) -> str:
    """An argument as the command line takes it: "with --eval-fraction 0.2", or "without --eval-fraction"."""
    if name == "source":
        return f"from {value}"
    option = f"--{name.replace('_', '-')}"
    if value is None or value is False or value == []:
        return f"without {option}"
    if isinstance(value, list):
        return f"with {' '.join(f'{option} {entry}' for entry in value)}"
    return f"with {option}" if value is True else f"with {option} {value}"
