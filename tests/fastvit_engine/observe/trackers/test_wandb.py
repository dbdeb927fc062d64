"""What Weights & Biases has of a run in its offline mode: the file that `wandb sync` uploads."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.in_full import only_in_full

wandb = pytest.importorskip("wandb", reason="wandb is not installed")


def records(path: Path) -> list[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, found, parts = path.read_bytes(), 7, [], b""  # after the mark of the format: LevelDB's log
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:  # the rest of a block that no header fits into
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            found.append(Record.FromString(parts))
            parts = b""
    return found


def rows(found: list[Any]) -> list[dict[str, Any]]:
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.HasField("history")
    ]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def test_a_run_has_its_name_its_configuration_and_the_numbers_of_every_row(track: Callable[..., None], tmp_path: Path):
    track("wandb", 0, 6)
    identity = json.loads((tmp_path / "b16" / "trackers.json").read_text())["id"]
    (path,) = tmp_path.glob(f"b16/wandb/offline-run-*/run-{identity}.wandb")
    found = records(path)
    run = next(record.run for record in found if record.HasField("run"))
    assert (run.run_id, run.project, run.display_name) == (identity, "vits", "b16")
    config = {item.key: json.loads(item.value_json) for record in found for item in record.run.config.update}
    config |= {item.key: json.loads(item.value_json) for record in found for item in record.config.update}
    assert config["seed"] == 3 and config["train"]["global_batch_size"] == 32
    told = rows(found)
    assert [row["step"] for row in told] == [1, 2, 3, 4, 5, 6, 6, 6]
    assert told[0]["train/loss"] == 2.0 and told[6]["eval/top1"] == 0.75 and told[7]["fewshot/5-shot"] == 0.5
    assert next(record.exit.exit_code for record in found if record.HasField("exit")) == 0


@only_in_full
def test_a_second_start_continues_the_same_run_and_may_repeat_steps(track: Callable[..., None], tmp_path: Path) -> None:
    track("wandb", 0, 4)
    track("wandb", 2, 6)
    paths = sorted(tmp_path.glob("b16/wandb/offline-run-*/run-*.wandb"), key=lambda path: path.parent.name)
    assert len(paths) == 2 and len({path.name for path in paths}) == 1
    first, second = (records(path) for path in paths)
    assert next(record.exit.exit_code for record in first if record.HasField("exit")) == 1
    assert [row["step"] for row in rows(second)] == [3, 4, 5, 6, 6, 6]
