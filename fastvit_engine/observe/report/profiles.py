"""The tables of a run's profiles: `profile/*.json` in its folder, by kind and by kernel."""

from collections.abc import Mapping
from typing import Any

from fastvit_engine.errors import UserError
from fastvit_engine.observe.report.page import Cell, Table
from fastvit_engine.observe.report.predictions import read_json
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.observe.units import counted, format_share

_KERNELS_SHOWN = 20  # of each profile, those that take longest


def read_profiles(folder: RunFolder) -> list[Table]:
    """Two tables per profile, in the order of their files' names. Raises UserError if one is damaged."""
    tables = []
    for path in sorted((folder.path / "profile").glob("*.json")):
        named = folder.describe(path)
        content = read_json(path, named)
        try:
            tables += _tables(content)
        except (KeyError, TypeError, ValueError, OverflowError, IndexError) as error:
            problem = f"does not hold the tables of a profile ({error!r})"
            raise UserError(f"{named} {problem}: remove it, or profile again") from error
    return tables


def _tables(profile: Mapping[str, Any]) -> list[Table]:
    steps = [int(step) for step in profile["steps"]]
    where = f"rank {int(profile['rank'])} on {profile['host']} ({profile['device']})"
    note = f"Mean of {counted(len(steps), 'step')} from step {steps[0]:,} on, {where}."
    kernels = profile["kernels"]
    if len(kernels) > _KERNELS_SHOWN:
        note += f" The {_KERNELS_SHOWN} of {len(kernels):,} kernels that take longest are listed."
    columns = ["", "ms per step", "share", "calls per step"]
    return [
        Table("Profile by kind", columns, [_row(line, len(steps)) for line in profile["kinds"]], note),
        Table("Profile by kernel", columns, [_row(line, len(steps)) for line in kernels[:_KERNELS_SHOWN]]),
    ]


def _row(line: Mapping[str, Any], steps: int) -> list[Cell]:
    milliseconds, calls = 1000 * float(line["seconds"]) / steps, int(line["calls"]) / steps
    share = format_share(float(line["share"]))
    return [Cell(text) for text in (str(line["name"]), f"{milliseconds:.3g}", share, f"{calls:,.4g}")]
