"""The state of a run as a manifest has it, of this version and of earlier ones."""

import json

import pytest

from fastvit_engine.checkpoint import DamagedCheckpoint, Manifest, Recovery, TrainerState
from fastvit_engine.checkpoint.format import StoredFile, StoredTensor
from fastvit_engine.checkpoint.trainer_state import Fp8State
from fastvit_engine.errors import UserError

STATE = TrainerState(
    step=40,
    fingerprint={"model": {"name": "Ti/4"}, "seed": 3},
    seconds=12.5,
    consumed=1312,
    bad_samples=2,
    recent=((2.5, 1.0), (2.25, 0.5)),
    accuracy={"eval": {"top1": 0.5, "top5": None, "loss": 1.5, "samples": 4}},
    evaluated_at=40,
    recovery=Recovery(skipped=((32, 64),), failed=((32, 64), (96, 128)), rewinds=2),
    pixels={"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "eval_crop": 0.9, "eval_transform": "big_vision"},
    class_names=("cat", "dog"),
    batch_sizes=((0, 32), (10, 48)),
    fp8=Fp8State(("blocks.3.fc1",), {"blocks.2.qkv": 7}),
)
# A manifest as version 0.1.0 wrote it.
EARLIER = {
    "format": 1,
    "step": 40,
    "state": {
        "step": 40,
        "seconds": 12.5,
        "consumed": 1312,
        "skipped": [[32, 64]],
        "recent": [[2.5, 1.0], [2.25, 0.5]],
        "bad_samples": 2,
        "fingerprint": {"model": {"name": "Ti/4"}, "seed": 3},
        "accuracy": {},
        "evaluated_at": None,
    },
    "scalars": {"optimizer.step": 40.0},
    "parameters": {"a": [2, 3]},
    "files": {},
}


@pytest.mark.parametrize(
    "sizes", [[[1, 32]], [[0, 32], [0, 64]], [[0, 32], [9, 8], [5, 16]], [[0, 0]], [[0.5, 8]], [[0]]]
)
def test_batch_sizes_that_make_no_sense_are_damage(sizes):
    with pytest.raises((ValueError, TypeError)):
        TrainerState.from_json({**STATE.to_json(), "batch_sizes": sizes})


def test_a_state_of_an_earlier_version_had_one_batch():
    state = TrainerState.from_json({**EARLIER["state"], "fingerprint": {"model": {}, "global_batch_size": 32}})
    assert state.batches.changes == ((0, 32),)


def test_a_state_comes_back_from_its_json():
    assert TrainerState.from_json(json.loads(json.dumps(STATE.to_json()))) == STATE


def test_a_manifest_of_an_earlier_version_is_read():
    manifest = Manifest.from_json(json.dumps(EARLIER).encode(), "manifest.json")
    assert manifest.step == 40
    assert manifest.state.consumed == 1312
    assert manifest.state.recovery == Recovery(skipped=((32, 64),))
    assert (manifest.state.evaluated_at, manifest.state.pixels) == (None, None)


def test_this_version_writes_what_an_earlier_one_reads():
    """All keys of before are there, with the same meaning."""
    written = json.loads(Manifest(STATE, {}, {}, {}).to_json())
    assert written.keys() == EARLIER.keys() | {"crc32"}
    assert written["state"].keys() >= EARLIER["state"].keys()
    assert written["state"]["skipped"] == EARLIER["state"]["skipped"]


@pytest.mark.parametrize("key", [key for key in EARLIER["state"] if key != "evaluated_at"])
@pytest.mark.parametrize("value", [None, "x"])
def test_a_manifest_with_something_missing_or_wrong_is_a_damaged_checkpoint(key, value):
    """Not an error of the program: then the checkpoint before it is used."""
    for state in ({**EARLIER["state"], key: value}, {k: v for k, v in EARLIER["state"].items() if k != key}):
        with pytest.raises(DamagedCheckpoint, match="manifest.json is not what was written there"):
            Manifest.from_json(json.dumps({**EARLIER, "state": state}).encode(), "manifest.json")


TENSOR = {"dtype": "F32", "start": 0, "length": 6, "offset": 8, "crc32": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"format": "1"},
        {"format": None},
        {"state": []},
        {"state": {**EARLIER["state"], "step": -1}},
        {"state": {**EARLIER["state"], "step": True}},
        {"state": {**EARLIER["state"], "step": 10**30}},
        {"state": {**EARLIER["state"], "recent": [[1.0]]}},
        {"state": {**EARLIER["state"], "accuracy": {"eval": {"top1": "high"}}}},
        {"state": {**EARLIER["state"], "accuracy": {"eval": 0.5}}},
        {"state": {**EARLIER["state"], "pixels": {"mean": 0.5, "std": 0.5}}},
        {"state": {**EARLIER["state"], "skipped": [[64, 32]]}},
        {"state": {**EARLIER["state"], "fingerprint": {"model": {}, "data": []}}},
        {"state": {**EARLIER["state"], "fingerprint": {"model": {}, "data": {"order": "indexed", "sources": [{}]}}}},
        {"scalars": {"optimizer.step": "40"}},
        {"scalars": None},
        {"parameters": {"a": [2, -3]}},
        {"parameters": {"a": [2.5]}},
        {"parameters": []},
        {"files": {"rank-0": None}},
        {"files": {"rank-0": {"size": "32", "tensors": []}}},
        {"files": {"rank-0": {"size": 32, "tensors": [["weight", "a"]]}}},
        {"files": {"rank-0": {"size": 32, "tensors": [["weight", "a", {**TENSOR, "dtype": "F31"}]]}}},
        {"files": {"rank-0": {"size": 31, "tensors": [["weight", "a", TENSOR]]}}},
        {"files": {"rank-0": {"size": 32, "tensors": [["weight", "b", TENSOR]]}}},
        {"files": {"rank-0": {"size": 99, "tensors": [["weight", "a", {**TENSOR, "start": 1}]]}}},
        {"files": {"rank-0": {"size": 32, "tensors": [["weight", "a", {**TENSOR, "offset": -8}]]}}},
        {"files": {"../rank-0": {"size": 32, "tensors": [["weight", "a", TENSOR]]}}},
        {"crc32": 5},
    ],
    ids=str,
)
def test_a_manifest_of_the_wrong_types_is_a_damaged_checkpoint(change):
    whole = {**EARLIER, "files": {"rank-0": {"size": 32, "tensors": [["weight", "a", TENSOR]]}}}
    assert Manifest.from_json(json.dumps(whole).encode(), "manifest.json").gap() is None
    with pytest.raises(DamagedCheckpoint, match="manifest.json is not what was written there"):
        Manifest.from_json(json.dumps({**whole, **change}).encode(), "manifest.json")


def test_state_may_be_of_some_parameters_or_of_other_shapes():
    def at(length, offset):
        return StoredTensor("F32", 0, length, offset, 1)

    weights = [("weight", "a", at(6, 0)), ("weight", "b", at(4, 24))]
    state = [("momentum_buffer", "a", at(6, 40)), ("rows", "a", at(2, 64))]
    shapes = {"momentum_buffer": {"a": [2, 3]}, "rows": {"a": [2]}}

    def read(tensors, shapes):
        manifest = Manifest(
            STATE, {}, {"a": [2, 3], "b": [4]}, {"rank-0": StoredFile(72, tensors)}, state_shapes=shapes
        )
        return Manifest.from_json(manifest.to_json(), "manifest.json")

    whole = read(weights + state, shapes)
    assert whole.gap() is None
    assert whole.shapes_of("rows") == {"a": [2]} and whole.shapes_of("weight") == {"a": [2, 3], "b": [4]}
    assert read(weights + state, {**shapes, "rows": {"a": [3]}}).gap() == "parameter 'a' (rows) is not there whole"
    assert "'b' (momentum_buffer)" in str(read(weights + state, {"rows": {"a": [2]}}).gap())
    for damaged in ({**shapes, "rows": {"a": [1]}}, {**shapes, "rows": {"b": [4]}}, {**shapes, "rows": {"c": [2]}}):
        with pytest.raises(DamagedCheckpoint):
            read(weights + state, damaged)


@pytest.mark.parametrize("text", [b"", b"null", b"[]", b"1", bytes(900), b"[" * 10**5, b"\xff", b'{"format": 1}'])
def test_what_is_no_manifest_is_a_damaged_checkpoint(text):
    with pytest.raises(DamagedCheckpoint, match="manifest.json is not what was written there"):
        Manifest.from_json(text, "manifest.json")


def test_a_manifest_is_covered_by_its_checksum():
    text = Manifest(STATE, {"loss_scale": 1.0}, {}, {}).to_json()
    assert Manifest.from_json(text, "manifest.json").state == STATE
    for at in range(len(text)):
        damaged = bytearray(text)
        damaged[at] ^= 1
        with pytest.raises(DamagedCheckpoint):
            Manifest.from_json(bytes(damaged), "manifest.json")


def test_a_manifest_of_a_later_format_is_no_damage():
    with pytest.raises(UserError, match="manifest.json has format 2, and this version reads 1") as error:
        Manifest.from_json(json.dumps({**EARLIER, "format": 2}).encode(), "manifest.json")
    assert not isinstance(error.value, DamagedCheckpoint)


def test_merging_keeps_everything_that_either_remembers():
    other = Recovery(skipped=((0, 32), (32, 64)), failed=((0, 32),), rewinds=1)
    both = STATE.recovery.merge(other)
    assert both == Recovery(skipped=((0, 32), (32, 64)), failed=((0, 32), (32, 64), (96, 128)), rewinds=2)
    assert other.merge(STATE.recovery) == both
