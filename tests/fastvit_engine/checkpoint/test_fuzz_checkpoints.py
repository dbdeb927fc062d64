"""Any bytes in a checkpoint are read or reported as damage in one sentence, in bounded time and memory."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastvit_engine.checkpoint import (
    Checkpoint,
    Manifest,
    TrainerState,
    doubt_about_latest,
    usable_checkpoints,
)
from fastvit_engine.checkpoint.export import _exported_from
from fastvit_engine.checkpoint.format import Block, TensorFile
from fastvit_engine.checkpoint.load import load_model
from fastvit_engine.checkpoint.local import LocalStore
from fastvit_engine.checkpoint.reader import CheckpointReader
from fastvit_engine.checkpoint.run_config import read_section
from fastvit_engine.engine.protocol import ParameterSlice
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.train.recovery import load_recovery
from tests.fastvit_engine.checkpoint.test_trainer_state import STATE
from tests.fastvit_engine.fuzzing import fuzz, mutated, read_or_refuse

pytestmark = pytest.mark.timeout(3600)

VALUES = torch.arange(6, dtype=torch.float32)


def _publish(store: LocalStore, step: int) -> Path:
    file = TensorFile([Block("weight/a@0", "F32", memoryview(VALUES.numpy()).cast("B"))])
    name = f"step-{step:08d}"
    store.prepare(name, 0)
    store.write(name, "rank-00000.safetensors", file.chunks())
    manifest = Manifest(replace(STATE, step=step), {"x": 1.0}, {"a": [2, 3]}, {"rank-00000.safetensors": file.stored()})
    store.publish(name, manifest.to_json())
    store.point_latest(name)
    return store.folder / name


def _load(checkpoint: Checkpoint) -> tuple[TrainerState, torch.Tensor]:
    manifest = checkpoint.read_manifest()
    values = torch.full((6,), float("nan"))
    CheckpointReader(checkpoint, manifest).fill({"weight": [ParameterSlice("a", 0, values)]})
    return manifest.state, values


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    store = LocalStore(tmp_path_factory.mktemp("fuzz") / "checkpoints")
    for step in (3, 4):
        _publish(store, step)
    return store


WORDS = [b"NaN", b"1e999", b"-1", b"null", b"true", b"{}", b"F64", b'"crc32": 1', b"99999999999999999999"]


@fuzz
@given(data=st.data(), checksum=st.booleans())
def test_manifests(store: LocalStore, data: st.DataObject, checksum: bool) -> None:
    """With a checksum nothing that was changed is read; without, as of earlier versions, nothing is a traceback."""
    path = store.folder / "step-00000004" / "manifest.json"
    whole = path.read_bytes()
    earlier = json.dumps({key: value for key, value in json.loads(whole).items() if key != "crc32"}).encode()
    content = data.draw(mutated([whole if checksum else earlier], WORDS))
    try:
        path.write_bytes(content)
        newest, older = usable_checkpoints(store)
        read = read_or_refuse(lambda: _load(newest))
        assert read is None or not checksum or content == whole
        if read is None:
            assert torch.equal(_load(older)[1], VALUES)
    finally:
        path.write_bytes(whole)


@fuzz
@given(data=st.data())
def test_tensors(store: LocalStore, data: st.DataObject) -> None:
    path = store.folder / "step-00000004" / "rank-00000.safetensors"
    whole = path.read_bytes()
    try:
        path.write_bytes(data.draw(mutated([whole])))
        read = read_or_refuse(lambda: _load(Checkpoint(store, "step-00000004")))
        assert read is None or torch.equal(read[1], VALUES)
    finally:
        path.write_bytes(whole)


@fuzz
@given(content=mutated([b"step-00000004", b"step-00000003\n", b"step-00000005"], [b"/", b"..", "²".encode(), b"step-"]))
def test_latest(store: LocalStore, content: bytes) -> None:
    (store.folder / "latest").write_bytes(content)
    found = read_or_refuse(lambda: usable_checkpoints(store))
    assert found is not None and [c.step for c in found if (store.folder / c.name).exists()] == [4, 3]
    doubt = doubt_about_latest(store)
    assert doubt is None or "\n" not in doubt


CONFIGURATIONS = [b"checkpoint: {path: x}\ndata: {mean: [0.5]}\n", b"a: &a {b: 1}\ncheckpoint: *a\n"]


@fuzz
@given(content=mutated(CONFIGURATIONS, [b"*a", b"&a ", b"2024-13-45"]))
def test_configurations_of_runs(tmp_path: Path, content: bytes) -> None:
    run = RunFolder(tmp_path)
    run.config.write_bytes(content)
    for name in ("checkpoint", "data"):
        section = read_or_refuse(lambda name=name: read_section(run, name))
        assert section is None or isinstance(section, dict)


@fuzz
@given(content=mutated([json.dumps(STATE.recovery.to_json()).encode()], WORDS))
def test_recovery_json(tmp_path: Path, content: bytes) -> None:
    run = RunFolder(tmp_path)
    run.recovery.write_bytes(content)
    recovery = read_or_refuse(lambda: load_recovery(run))
    assert recovery is None or all(0 <= first < last for first, last in recovery.skipped + recovery.failed)


@fuzz
@given(data=st.data())
def test_exported_files(tmp_path: Path, data: st.DataObject) -> None:
    metadata = {"format": "pt", "model": '{"name": "Ti/4"}', "mean": "[0.5, 0.5, 0.5]", "step": "1", "checkpoint": "x"}
    file = TensorFile([Block("a@0", "F32", memoryview(VALUES.numpy()).cast("B"))], metadata)
    path = tmp_path / "x.safetensors"
    path.write_bytes(data.draw(mutated([b"".join(file.chunks())], [b"\xff" * 8, b'"mean"', b"\\u0000", *WORDS])))
    read_or_refuse(lambda: load_model(path))
    read_or_refuse(lambda: _exported_from(path))
