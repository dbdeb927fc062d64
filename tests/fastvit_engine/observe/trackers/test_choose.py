"""Which trackers a run has, and the id by which they know it."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from fastvit_engine.errors import UserError
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.observe.trackers.choose import _identity, check_installed


@pytest.mark.parametrize(
    ("tracker", "module"), [("wandb", "wandb"), ("mlflow", "mlflow"), ("mlflow", "alembic"), ("trackio", "trackio")]
)
def test_a_missing_package_is_refused_with_what_to_install(
    tracker: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else object())
    with pytest.raises(UserError, match=rf"{tracker} in it needs the package {module}.*fastvit-engine\[{tracker}\]"):
        check_installed(["tensorboard", tracker])


def test_the_id_of_a_run_is_the_same_at_every_start(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert _identity(run) == _identity(run) == json.loads(run.trackers.read_text())["id"]


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]", b'{"id": 7}', b'{"id": "../../x"}', b"[" * 100_000])
def test_a_damaged_file_is_replaced_with_a_warning(content: bytes, tmp_path: Path, capfd: Any) -> None:
    run = RunFolder(tmp_path)
    run.trackers.write_bytes(content)
    assert _identity(run) == json.loads(run.trackers.read_text())["id"]
    assert "trackers begin another run" in capfd.readouterr().err
