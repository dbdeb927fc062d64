"""The stored configuration of a run, of any version: only what a command needs of it, not validated as a whole."""

from typing import Any

import yaml

from fastvit_engine.config.bounded_yaml import read_yaml
from fastvit_engine.config.recipes import parse_yaml
from fastvit_engine.errors import UserError
from fastvit_engine.observe.run_folder import RunFolder


def read_section(run: RunFolder, name: str) -> dict[str, Any] | None:
    """A section of the run's config.yaml; None if the run has no such file, {} if the file has no such section.

    Raises UserError if the file is damaged.
    """
    try:
        values = parse_yaml(read_yaml(run.config))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{run.config} cannot be read ({error.strerror}): make it readable") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise damaged_config(run) from error
    section = (values.get(name) or {}) if isinstance(values, dict) else None
    if not isinstance(section, dict):
        raise damaged_config(run)
    return section


def damaged_config(run: RunFolder) -> UserError:
    return UserError(
        f"{run.config} is empty or damaged: restore it, or move it away and give {run.checkpoints} in place of the run"
    )
