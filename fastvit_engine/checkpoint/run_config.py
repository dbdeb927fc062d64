"""The stored configuration of a run, of any version: only what a command needs of it, not validated as a whole."""

from typing import Any

import yaml

from fastvit_engine.config.bounded_yaml import read_yaml
from fastvit_engine.config.recipes import parse_yaml
from fastvit_engine.errors import UserError
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.shown import public_url
from fastvit_engine.storage.stores import open_store, store_failures


def read_section(run: RunFolder, name: str) -> dict[str, Any] | None:
    """A section of the run's config.yaml; None if the run has no such file, {} if the file has no such section.

    Raises UserError if the file is damaged.
    """
    try:
        values = parse_yaml(_read(run))
    except FileNotFoundError:
        return None
    except OSError as error:
        where = run.describe(run.config)
        raise UserError(f"{where} cannot be read ({error.strerror or error}): make it readable") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise damaged_config(run) from error
    section = (values.get(name) or {}) if isinstance(values, dict) else None
    if not isinstance(section, dict):
        raise damaged_config(run)
    return section


def _read(run: RunFolder) -> str:
    """The text of config.yaml; from the store, if the run is in one."""
    if run.url is None:
        return read_yaml(run.config)
    store, folder = open_store(run.url)
    with store_failures(run.url):
        return store.read(f"{folder}/{run.config.name}".lstrip("/")).decode("utf-8-sig")


def damaged_config(run: RunFolder) -> UserError:
    return UserError(
        f"{run.describe(run.config)} is empty or damaged: restore it, or move it away and give "
        f"{public_url(run.checkpoint_location)} in place of the run"
    )
