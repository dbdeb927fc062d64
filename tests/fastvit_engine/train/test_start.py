"""Whether a run may continue from its checkpoint, by what its data was."""

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from fastvit_engine.checkpoint import Manifest, Recovery
from fastvit_engine.checkpoint.local import LocalStore
from fastvit_engine.config import Config, load_config
from fastvit_engine.data.stream.prepare import prepare_few_shot
from fastvit_engine.errors import UserError
from fastvit_engine.observe.events import read_events, record_event
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.sizing.defaults import choose
from fastvit_engine.sizing.machine import Machine
from fastvit_engine.train.recovery import save_recovery
from fastvit_engine.train.start import _check_none_elsewhere, preflight, record_batch_change


def write_shard(path, labels):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "PNG")
    with tarfile.open(path, "w") as tar:
        for number, label in enumerate(labels):
            for extension, content in {"png": buffer.getvalue(), "cls": str(label).encode()}.items():
                info = tarfile.TarInfo(f"sample{number:04d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.fixture
def shards(tmp_path):
    return [
        write_shard(tmp_path / f"{name}.tar", [n % 10 for n in range(size)]) for name, size in (("a", 300), ("b", 9))
    ]


def start(
    run,
    train,
    resume=True,
    duration="100 steps",
    processes=1,
    augment=None,
    batch=8,
    allow=False,
    model=None,
    seed=0,
    objective="classify",
    checkpoints=None,
    **data,
):
    sections = {
        "seed": seed,
        "model": {"name": "Ti/4", "image_size": 8, "num_classes": 10, **(model or {})},
        "data": {"train": train, **data},
        "train": {"global_batch_size": batch, "duration": duration, "precision": "fp32", "objective": objective},
        "schedule": {"warmup": "0 steps"},
        "augment": augment or {},
        "checkpoint": {"path": checkpoints},
    }
    given = {"resume": resume, "allow_batch_change": allow}
    return preflight(Config.model_validate(sections), run, processes, **given)


@pytest.fixture
def stopped(tmp_path, shards):
    """begin(data.train, ...) -> a run folder with a checkpoint after 40 steps, of which only the state is there."""

    def begin(train, model=None, **data):
        run = RunFolder(tmp_path / "run")
        began = start(run, train, resume=False, model=model, **data)
        folder = run.checkpoints / "step-00000040"
        folder.mkdir(parents=True)
        state = replace(began.state, step=40, consumed=320, bad_samples=3, seconds=1.0)
        (folder / "manifest.json").write_bytes(Manifest(state, {}, {}, {}).to_json())
        (run.checkpoints / "latest").write_text(folder.name)
        return run

    return begin


def test_the_same_content_elsewhere_goes_on(stopped, shards, tmp_path):
    run = stopped(shards[0])
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / "c.tar"
    copy.write_bytes((tmp_path / "a.tar").read_bytes())
    (tmp_path / "a.tar").unlink()
    again = start(run, str(copy))
    assert (again.step, again.state.consumed, again.state.bad_samples) == (40, 320, 3)
    assert again.data.train[0].lanes == 2 and "300 samples, mixed from 2 lanes (data.lanes)" in again.message


def test_a_run_that_has_saved_checkpoints_elsewhere_does_not_begin_again(shards, tmp_path):
    """--resume auto with another checkpoint.path, or on a machine that does not have that folder."""
    run = RunFolder(tmp_path / "run")
    record_event(run, "checkpoint", "saved", step=40, path="s3://bucket/b16/step-00000040")
    message = rf"{run} has saved checkpoints in s3://bucket/b16, and {run.checkpoints} has none: set checkpoint.path"
    with pytest.raises(UserError, match=message):
        start(run, shards[1])
    run.events.unlink()
    record_event(run, "checkpoint", "saved", step=40, path=f"{run.checkpoints}/step-00000040")
    assert start(run, shards[1]).step == 0  # they were removed on purpose
    with pytest.raises(UserError, match=rf"{run.checkpoints}, and .* has none: set checkpoint.path to where they are"):
        _check_none_elsewhere(RunFolder(run.path, "s3://bucket/run"), LocalStore(run.checkpoints))


def test_the_first_line_of_a_run_counts_in_words(shards, tmp_path):
    message = start(RunFolder(tmp_path / "run"), shards[1], resume=False).message
    assert message.endswith("100 steps, reading 9 samples in 1 lane (data.lanes)")
    two = [{"shards": shards[0]}, {"shards": shards[1]}]
    message = start(RunFolder(tmp_path / "run"), two, resume=False).message
    assert message.endswith("reading 309 samples, mixed from 2 + 1 lanes (data.lanes)")


def test_the_first_line_says_if_an_epoch_is_not_what_the_shards_hold(shards, tmp_path):
    message = start(RunFolder(tmp_path / "run"), shards[1], resume=False, train_samples=5000).message
    assert message.endswith("(data.lanes); an epoch counts as 5,000 samples (data.train_samples)")


def test_fewer_classes_than_outputs_and_a_batch_larger_than_the_data_are_warned_of(shards, tmp_path):
    def warnings(**data):
        return start(RunFolder(tmp_path / "run"), shards[0], resume=False, **data).warnings

    assert warnings() == ()
    info = {"classes": list("abcdefghij"), "source": "x", "seed": 0, "eval_fraction": 0.1, "samples_per_shard": 9}
    info |= {"train": {"samples": 300, "shards": {"a.tar": 300}}, "eval": {"samples": 0, "shards": {}}}
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    assert warnings() == ()
    (tmp_path / "dataset.json").write_text(json.dumps(info | {"classes": ["ant", "bee", "cow"]}))
    unseen = "so 7 outputs will never see an image: set model.num_classes=3"
    assert warnings() == (f"data.train has 3 classes and model.num_classes is 10, {unseen}",)
    (tmp_path / "dataset.json").unlink()
    (large,) = warnings(train_samples=7)
    assert large.startswith("train.global_batch_size is 8, and an epoch has only 7 samples: ")


def test_a_new_head_needs_the_number_of_classes(tmp_path):
    sections = {"init": {"from": "weights.npz"}, "data": {"train": "x"}}
    with pytest.raises(UserError, match="model.num_classes is not set, .* add --set model.num_classes=N"):
        preflight(Config.model_validate(sections), RunFolder(tmp_path), 1, resume=False)
    for model in ({"num_classes": 1000}, {"num_classes": 7}):
        with pytest.raises(UserError, match="x"):  # the shards
            preflight(Config.model_validate({**sections, "model": model}), RunFolder(tmp_path), 1, resume=False)


def test_few_shot_data_of_two_kinds_of_classes_is_refused(shards, tmp_path):
    """Their classes may be others, and more, than those of data.train, but must be the same in both."""
    info = {"source": "x", "seed": 0, "eval_fraction": 0.1, "samples_per_shard": 9}
    info |= {"train": {"samples": 300, "shards": {"a.tar": 300}}, "eval": {"samples": 0, "shards": {}}}
    words = [f"class {number}" for number in range(20)]

    def prepared(train, evaluation):
        for name, classes in (("one", train), ("two", evaluation)):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes())
            (tmp_path / name / "dataset.json").write_text(json.dumps(info | {"classes": classes}))
        few_shot = {"train": f"{tmp_path}/one/a.tar", "eval": f"{tmp_path}/two/a.tar"}
        sections = {"model": {"num_classes": 10}, "evaluate": {"fewshot": few_shot}}
        return prepare_few_shot(Config.model_validate(sections), tmp_path)

    assert prepared(words, words) is not None
    with pytest.raises(UserError, match="fewshot.train has 20 classes and evaluate.fewshot.eval 19: give shards of"):
        prepared(words, words[:-1])
    other = r"class 0 is 'class 0' in evaluate.fewshot.train and 'class 19' in evaluate.fewshot.eval"
    with pytest.raises(UserError, match=other):
        prepared(words, words[::-1])


def test_another_batch_is_refused_with_what_allows_it(stopped, shards):
    run = stopped(shards[0])
    with pytest.raises(UserError) as refused:
        start(run, shards[0], batch=12)
    assert str(refused.value).endswith(
        "was written with train.global_batch_size 8 and this run has 12: set it back, or add --allow-batch-change "
        "(from Python: allow_batch_change=True) to continue with 12"
    )


@pytest.mark.parametrize(("duration", "total"), [("100 steps", 100), ("3 epochs", 40 + (900 - 320) / 12)])
def test_a_batch_changed_on_purpose_continues_the_order(stopped, shards, duration, total):
    run = stopped(shards[0], duration=duration)
    changed = start(run, shards[0], batch=12, allow=True, duration=duration)
    assert changed.total_steps == round(total)
    assert (changed.step, changed.state.consumed, changed.batch_before) == (40, 320, 8)
    assert changed.state.batch_sizes == ((0, 8), (40, 12))
    assert changed.state.fingerprint["global_batch_size"] == 12
    record_batch_change(run, changed)
    (event,) = read_events(run)
    assert (event["event"], event["step"], event["before"], event["after"]) == ("batch_change", 40, 8, 12)
    assert event["message"].startswith("train.global_batch_size is 12 from step 40 on, and was 8: the run has ")


def test_allowing_a_change_changes_nothing_by_itself(stopped, shards):
    run = stopped(shards[0])
    same = start(run, shards[0], allow=True)
    assert (same.batch_before, same.state.batch_sizes) == (None, ((0, 8),))
    record_batch_change(run, same)
    assert read_events(run) == []


def test_a_batch_that_streams_cannot_continue_with_is_refused(stopped, shards, tmp_path):
    def changed(batch):
        return start(run, everything, batch=batch, allow=True, **two)

    everything, two = f"{tmp_path}/*.tar", {"order": "stream", "streams": 2, "num_workers": 0}
    run = stopped(everything, **two)
    assert changed(12).state.batch_sizes == ((0, 8), (40, 12))
    with pytest.raises(
        UserError, match="was 8 and is 9 now, which 2 data streams can change only between multiples of 2"
    ):
        changed(9)


def test_processes_without_a_pair_of_images_are_warned_of(shards, tmp_path):
    def warnings(processes, **augment):
        return start(
            RunFolder(tmp_path / "run"), shards[0], resume=False, processes=processes, augment=augment
        ).warnings

    assert warnings(4, mixup=0.2) == warnings(7) == ()
    (idle,) = warnings(7, mixup=0.2)
    assert idle == (
        "3 of 7 processes have nothing to do: images are mixed in pairs, of which train.global_batch_size = 8 has "
        "fewer; raise it to 14"
    )


def test_a_run_that_went_further_than_its_duration_says_so(stopped, shards):
    run = stopped(shards[0])
    shorter = start(run, shards[0], duration="20 steps")
    assert shorter.message == (
        f"{run.path} is complete, with 40 steps (more than the 20 of train.duration = '20 steps'): nothing to do"
    )
    assert start(run, shards[0], duration="40 steps").message.endswith("is complete, with 40 steps: nothing to do")


def record_transform(run, value):
    """Makes the checkpoint one that evaluated so; None: one of a version that had no such key."""
    path = run.checkpoints / "step-00000040" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("crc32", None)
    manifest["state"]["pixels"].pop("eval_transform")
    if value is not None:
        manifest["state"]["pixels"]["eval_transform"] = value
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(("recorded", "kept"), [(None, "fast"), ("big_vision", "big_vision"), ("timm", "timm")])
def test_a_resumed_run_keeps_its_evaluation_unless_another_is_set(stopped, shards, recorded, kept):
    run = stopped(shards[0])
    record_transform(run, recorded)
    again = start(run, shards[0], eval=shards[1])
    assert (again.eval_transform, again.state.pixels["eval_transform"]) == (kept, kept)
    notice = f"evaluation stays {kept}, as so far, for figures that can be compared: to change it, set data.eval_transf"
    assert (notice in again.message) == (kept != "timm")
    resolved = load_config("photos", {"data.train": shards[0], "zero.stage": 1, "train.precision": "fp32"})
    settled, chosen = again.settle(resolved, choose(resolved.config, Machine(1, 1, 10**11, on_gpu=False)))
    assert settled.config.data.eval_transform == chosen.config.data.eval_transform == kept
    assert settled.origins["data.eval_transform"] == ("default" if kept == "timm" else "checkpoint")
    for wanted in ("timm", "fast", "big_vision"):
        again = start(run, shards[0], eval=shards[1], eval_transform=wanted)
        assert (again.eval_transform, again.state.pixels["eval_transform"]) == (wanted, wanted)
        assert "evaluation stays" not in again.message


def test_a_new_run_evaluates_as_timm(stopped, shards, tmp_path):
    began = start(RunFolder(tmp_path / "run"), shards[0], resume=False)
    assert (began.eval_transform, began.state.pixels["eval_transform"]) == ("timm", "timm")


def test_recorded_lanes_hold_when_the_choice_would_be_another(stopped, shards):
    assert start(stopped(shards[0], lanes=13), shards[0]).data.train[0].lanes == 13


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 7}, "written with data.window 1024 and this run has 7: set it back"),
        ({"lanes": 4}, "written with data.train in 2 lanes and data.lanes is 4 now: set it back or leave it out"),
        ({"subset": 0.01}, r"written with all samples in data\.subset and this run has 3: set it back"),
        ({"order": "stream", "num_workers": 0}, "written with data.order indexed and this run has stream"),
        ({"train": "other"}, r"written with other shards in data\.train \(index .*restore the shards"),
        ({"train": [{"shards": "same"}, {"shards": "other"}]}, r"1 source in data.train and this run has 2"),
    ],
)
def test_another_order_is_refused(stopped, shards, changes, message):
    run = stopped(shards[0])
    names = {"same": shards[0], "other": shards[1]}
    train = changes.get("train", "same")
    train = names[train] if isinstance(train, str) else [{"shards": names[source["shards"]]} for source in train]
    with pytest.raises(UserError, match=message) as error:
        start(run, **({"train": train} | {key: value for key, value in changes.items() if key != "train"}))
    assert "step-00000040" in str(error.value) and "another run folder with --out" in str(error.value)


def test_other_weights_and_a_changed_source_are_refused(stopped, shards, tmp_path):
    run = stopped([{"shards": shards[0], "weight": 2}, {"shards": shards[1]}])
    with pytest.raises(UserError, match=r"weights \[2.0, 1.0\] in data.train and they are \[1.0, 1.0\] now"):
        start(run, [{"shards": shards[0]}, {"shards": shards[1]}])
    write_shard(tmp_path / "b.tar", [1] * 9)
    with pytest.raises(UserError, match="with other shards in source 2 of data.train"):
        start(run, [{"shards": shards[0], "weight": 2}, {"shards": shards[1]}])


def test_another_seed_is_another_order_and_refused(stopped, shards):
    with pytest.raises(UserError, match="was written with seed 0 and this run has 1: continue with the same seed"):
        start(stopped(shards[0]), shards[0], seed=1)


def test_checkpoints_outside_the_run_folder_are_left_alone_by_another_path_for_them(stopped, shards, tmp_path):
    checkpoints = stopped(shards[0]).checkpoints
    with pytest.raises(UserError, match=r"another run folder with --out and another checkpoint\.path"):
        start(RunFolder(tmp_path / "new"), shards[0], seed=1, checkpoints=str(checkpoints))


def test_what_is_left_out_is_what_the_run_folder_and_the_checkpoint_remember(stopped, shards):
    run = stopped(shards[0])
    path = run.checkpoints / "step-00000040" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["state"] |= {"skipped": [[8, 16]], "failed": [[8, 16]], "rewinds": 1}
    del manifest["crc32"]
    path.write_text(json.dumps(manifest))
    save_recovery(run, Recovery(skipped=((64, 72),), failed=((64, 72), (80, 88)), rewinds=2))
    recovery = start(run, shards[0]).state.recovery
    assert recovery.skipped == ((8, 16), (64, 72))
    assert recovery.failed == ((8, 16), (64, 72), (80, 88))
    assert recovery.rewinds == 2


def test_checkpoints_will_say_how_images_are_prepared_and_what_the_classes_are_called(digits, tmp_path):
    train = f"{digits}/train-*.tar"
    prepared = {"mean": (0.5, 0.4, 0.3), "std": (0.3, 0.2, 0.1), "eval_crop": 0.6}
    run = RunFolder(tmp_path / "run")
    state = start(run, train, resume=False, eval_transform="fast", **prepared).state
    assert state.pixels == {**prepared, "eval_transform": "fast"}
    assert state.class_names == tuple(str(digit) for digit in range(10))


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({}, {"drop_path": 0.1, "dropout": 0.2, "head_bias": -10}),
        ({"layer_scale": 0.1}, {"layer_scale": 1e-5}),
        ({}, {"width": 192, "depth": 12, "heads": 3, "mlp_dim": 768}),  # what Ti is
        ({"name": "S/4", "width": 192, "depth": 12, "heads": 3}, {}),
    ],
)
def test_what_does_not_shape_the_parameters_may_change(stopped, shards, before, now):
    run = stopped(shards[0], model=before)
    again = start(run, shards[0], model=now)
    assert again.step == 40
    assert {key: again.state.fingerprint["model"][key] for key in now} == now  # which its next checkpoint says
    late = [key for key in ("head_bias", "layer_scale") if key in now]
    assert [text.partition(" ")[0] for text in again.warnings] == [f"model.{key}" for key in late]
    assert all("sets the first weights only: the run continues with those of" in text for text in again.warnings)


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"activation": "gelu_tanh"}, "model.activation is 'gelu_tanh', was 'gelu'"),
        ({"layer_norm_eps": 1e-12}, "model.layer_norm_eps is 1e-12, was 1e-06"),
        ({"pos_embed_at": "shared"}, "model.pos_embed_at is 'shared', was 'input'"),
        ({"heads": 6}, "model.heads is 6, was None"),
        ({"pool": "gap", "drop_path": 0.1}, r"\(model.pool is 'gap', was 'cls'\)"),
        ({"registers": 2}, r"\(model.registers is 2, was 0\)"),
        ({"head": "mlp"}, "model.head is 'mlp', was 'linear'"),
        ({"layer_scale": 0.1}, "model.layer_scale is 0.1, was None"),
        ({"num_classes": 11}, "model.num_classes is 11, was 10"),
        ({"name": "Ti/8"}, "model.name is 'Ti/8', was 'Ti/4'"),
    ],
)
def test_other_parameters_or_another_meaning_of_them_is_another_model(stopped, shards, now, message):
    run = stopped(shards[0])
    with pytest.raises(UserError, match=f"belongs to another model .*{message}"):
        start(run, shards[0], model=now)


def test_a_checkpoint_that_knew_fewer_keys_of_the_model_and_spelt_its_name_otherwise_is_continued(stopped, shards):
    run = stopped(shards[0])
    path = run.checkpoints / "step-00000040" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["crc32"]  # earlier versions had none
    model = manifest["state"]["fingerprint"]["model"]
    model["name"] = "ViT-Ti/4"
    del model["layer_scale"], model["layer_norm_eps"]
    path.write_text(json.dumps(manifest))
    assert start(run, shards[0]).step == 40
    model["layer_scale"] = 0.1
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"belongs to another model \(model.layer_scale is None, was 0.1\)"):
        start(run, shards[0])
    del model["layer_scale"]
    model["gone"] = True
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"belongs to another model \(.*model.gone is None, was True"):
        start(run, shards[0])


def test_a_checkpoint_continues_with_its_objective_only(stopped, shards):
    run = stopped(shards[0])
    path = run.checkpoints / "step-00000040" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["crc32"]
    saved = manifest["state"]["fingerprint"]
    assert saved.pop("objective") == "classify"  # earlier versions had no other
    path.write_text(json.dumps(manifest))
    assert start(run, shards[0]).step == 40
    with pytest.raises(UserError, match=r"with the objective classify, and this run has focal:Focal: set train\.obj"):
        start(run, shards[0], objective="focal:Focal")
    saved["objective"] = "focal:Focal"
    path.write_text(json.dumps(manifest))
    assert start(run, shards[0], objective="focal:Focal").step == 40
    with pytest.raises(UserError, match="with the objective focal:Focal, and this run has classify: set"):
        start(run, shards[0])


def test_a_latest_that_names_something_else_is_said_and_the_newest_checkpoint_is_continued(stopped, shards):
    run = stopped(shards[0])
    assert start(run, shards[0]).warnings == ()
    (run.checkpoints / "latest").write_bytes(bytes(13))
    again = start(run, shards[0])
    assert again.step == 40
    (said,) = again.warnings
    newest = run.checkpoints / "step-00000040"
    assert said == (
        f"{run.checkpoints}/latest is damaged: continuing from {newest}, the newest checkpoint that is complete"
    )
