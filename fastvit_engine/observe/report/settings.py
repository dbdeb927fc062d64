"""In which settings, machines and software compared runs differ."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastvit_engine.observe.units import format_flops

_ENVIRONMENT = {  # what is compared of environment.json, and how it is called
    "model": "model",
    "parameters": "parameters",
    "total_steps": "steps",
    "global_batch_size": "global batch",
    "device": "device",
    "world_size": "processes",
    "zero_stage": "ZeRO stage",
    "precision": "precision",
    "hostname": "host",
    "peak_flops": "peak speed",
    "training_flops_per_image": "FLOPs per image",
}


class Difference(NamedTuple):
    """A setting, and its value in each run; None: the run has no such setting."""

    key: str
    values: list[str | None]


def flat_settings(configuration: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The settings of a configuration, as "section.key" and the value as JSON."""
    flat: dict[str, str] = {}
    for key, value in configuration.items():
        if isinstance(value, Mapping) and value:
            flat |= flat_settings(value, f"{prefix}{key}.")
        else:
            text = (
                value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str, skipkeys=True)
            )
            flat[f"{prefix}{key}"] = text
    return flat


def setting_differences(settings: Sequence[Mapping[str, str] | None]) -> list[Difference]:
    """The settings that are not alike in all runs whose settings are known; the name of the recipe is none."""
    keys = dict.fromkeys(key for one in settings if one is not None for key in one if key != "name")
    rows = [Difference(key, [None if one is None else one.get(key) for one in settings]) for key in keys]
    known = [place for place, one in enumerate(settings) if one is not None]
    return [row for row in rows if len({row.values[place] for place in known}) > 1]


def machine_differences(environments: Sequence[Mapping[str, Any]]) -> list[Difference]:
    """What else is not alike: model, machine and versions."""
    rows = [
        Difference(name, [_text(key, environment[key]) for environment in environments])
        for key, name in _ENVIRONMENT.items()
    ]
    packages = dict.fromkeys(package for environment in environments for package in environment["versions"])
    rows += [
        Difference(package, [_text("", environment["versions"].get(package)) for environment in environments])
        for package in packages
    ]
    return [row for row in rows if len(set(row.values)) > 1]


def _text(key: str, value: Any) -> str | None:
    if value is None:
        return None
    if key == "peak_flops":
        return f"{format_flops(value)}/s"
    if key == "training_flops_per_image":
        return format_flops(value)
    return f"{value:,}" if isinstance(value, int) else str(value)
