"""The diary of a run's configuration: every start's is kept in `configs/`, and what a start changes is an event.

`config.yaml` is the newest. The starts of a run whose configuration did not change share one file.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fastvit_engine.config import Config, Resolved
from fastvit_engine.config.keys import MOVED
from fastvit_engine.config.sections import BEFORE_EVAL_TRANSFORM
from fastvit_engine.files import atomic_write
from fastvit_engine.observe.disk import insist
from fastvit_engine.observe.events import record_event
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.shown import recorded, say

_NAME = re.compile(r"config-(\d{4,})\.yaml")
_BEFORE = {"data.eval_transform": BEFORE_EVAL_TRANSFORM}  # what keys that a file does not have were, if not the default
_NOT_SET = "not set"  # instead of a value: the key did not exist then, or does not now


class Change(NamedTuple):
    """A key whose value differs from the one at the run's last start; values as JSON has them."""

    key: str
    before: Any
    now: Any

    def describe(self) -> str:
        return f"{self.key} {_shown(self.before)} -> {_shown(self.now)}"


def record_configuration(run: RunFolder, resolved: Resolved, step: int) -> str:
    """Keeps the configuration of a start at `step`; returns the name of its file in the run folder.

    Prints and records what differs from the last start. Raises RestartError if the disk is full or lost for long.
    """
    text = resolved.to_yaml()
    number, last = _last(run)
    if number == 0 and last is not None:  # a run that an earlier version began
        number = 1
        _keep(run, number, last)
    if last is not None:
        _record_changes(run, last, resolved, step)
    if number == 0 or last != text:
        number += 1
        _keep(run, number, text)
    insist(lambda: atomic_write(run.config, text), str(run.config))
    return str(_file(run, number).relative_to(run.path))


def changes(before: Mapping[str, Any], config: Config) -> list[Change]:
    """The keys whose values differ between the content of a `config.yaml`, of any version, and a configuration.

    A key that is newer than the file had its default, or what `_BEFORE` says.
    """
    defaults, now = _flat(Config().model_dump(mode="json")) | _BEFORE, _flat(config.model_dump(mode="json"))
    then = {MOVED.get(key, key): value for key, value in _flat(before).items()}
    found = []
    for key in dict.fromkeys([*now, *then]):
        old = _public(then.get(key, defaults.get(key, _NOT_SET)))
        new = _public(now.get(key, _NOT_SET))
        if old != new:
            found.append(Change(key, old, new))
    return found


def _record_changes(run: RunFolder, last: str, resolved: Resolved, step: int) -> None:
    """Before the new configuration is kept: a start that is killed in between records its changes again."""
    try:
        before = yaml.safe_load(last)
    except (yaml.YAMLError, RecursionError):
        before = None
    if not isinstance(before, Mapping):
        message = f"the last start's configuration in {run} cannot be read: what has changed since is not known"
        say(f"warning: {message}")
        record_event(run, "configuration", message, step=step, changes=[])
        return
    if found := changes(before, resolved.config):
        message = f"changed from step {step} on: {'; '.join(change.describe() for change in found)}"
        say(message)
        facts = [{"key": change.key, "from": change.before, "to": change.now} for change in found]
        record_event(run, "configuration", message, step=step, changes=facts)


def _last(run: RunFolder) -> tuple[int, str | None]:
    """The number and the text of the last start's configuration; 0 if it is in no file of its own, None if in none."""
    numbers = [int(match[1]) for path in run.configs.glob("config-*.yaml") if (match := _NAME.fullmatch(path.name))]
    number = max(numbers, default=0)
    try:
        path = _file(run, number) if number else run.config
        return number, path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return number, None


def _keep(run: RunFolder, number: int, text: str) -> None:
    path = _file(run, number)

    def write() -> None:
        run.configs.mkdir(exist_ok=True)
        atomic_write(path, text)

    insist(write, str(path))


def _file(run: RunFolder, number: int) -> Path:
    return run.configs / f"config-{number:04d}.yaml"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and their values; a mapping without keys has none."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _public(value: Any) -> Any:
    """The value as a configuration that is written down has it: without secrets, and of JSON's types."""
    public = recorded(value)
    return public if isinstance(public, bool | int | float | str | list | None) else str(public)


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
