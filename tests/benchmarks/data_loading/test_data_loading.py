import importlib.util
import io
import json
from dataclasses import replace
from itertools import islice
from time import process_time

import pytest
import torch
from PIL import Image

from benchmarks.data_loading import variants
from benchmarks.data_loading.dali import DALI
from benchmarks.data_loading.measure import Result, measure
from benchmarks.data_loading.nvjpeg import NVJPEG
from benchmarks.data_loading.spdl import SPDL
from benchmarks.data_loading.variants import VARIANTS, StageTimes, Variant, open_dataset
from benchmarks.suite import wrong
from fastvit_engine.cli import main
from fastvit_engine.data.check.speed import LoaderTime, link_shards
from fastvit_engine.data.pixels import jpeg_part
from fastvit_engine.errors import UserError


@pytest.fixture(scope="module")
def plain_shards(tmp_path_factory, write_tar, photo):
    """40 photos in three shards."""
    folder = tmp_path_factory.mktemp("plain")
    for number, (begin, end) in enumerate([(0, 15), (15, 25), (25, 40)]):
        pairs = [((f"s{n}.jpg", photo(n, 40, 50)), (f"s{n}.cls", b"7")) for n in range(begin, end)]
        write_tar(folder / f"{number}.tar", [member for pair in pairs for member in pair])
    return folder


@pytest.fixture(scope="module")
def dataset(plain_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "links"
    link_shards(str(plain_shards), folder)
    return open_dataset("photos", str(folder), 16, 8, folder)


def test_command_measures_and_writes_its_report(plain_shards, tmp_path, capsys, monkeypatch):
    before = sorted(plain_shards.iterdir())
    monkeypatch.setattr("benchmarks.data_loading.run.VARIANTS", VARIANTS[:4])  # timm takes seconds to import
    arguments = ["--image-size", "16", "--workers", "1", "--rounds", "1", "--repack", "24", "--quick", "--json"]
    assert main(["bench", "data", str(plain_shards), "--out", str(tmp_path / "out"), *arguments]) == 0
    printed = json.loads(capsys.readouterr().out)
    (written,) = (tmp_path / "out").glob("*/data-*.json")
    assert printed == json.loads(written.read_text())
    assert sorted(plain_shards.iterdir()) == before
    assert [(row["dataset"], row["variant"]) for row in printed["results"]] == [
        (name, variant.name) for name in ("as they are", "short side 24") for variant in VARIANTS[:4]
    ]
    for row in printed["results"]:
        assert row["skipped"] is None and row["over_recipe"] > 0
        assert set(row["images_per_cpu_second"]) == {"0", "1"} and min(row["images_per_cpu_second"].values()) > 0
        assert row["stages"][0]["decode"] > 0 and row["loaders"]["1"][0]["images"] >= 64
    text = written.with_suffix(".md").read_text()
    assert "| wds + PIL |" in text and "40 samples" in text and "Pillow bilinear, antialiased" in text
    with Image.open(written.with_suffix(".png")) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 5


@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("timm", "torchvision"))), reason="needs timm")
def test_timm_gives_what_it_is_said_to(dataset):
    (result,) = measure([dataset], VARIANTS[4:], workers=0, rounds=1, images=8, progress=lambda line: None)
    assert result.skipped is None and result.cpu(0) > 0


def test_whole_rows_give_the_same_batches(tmp_path, plain_shards, write_tar, photo, monkeypatch):
    """Decoded from other data."""
    pixels = Image.open(io.BytesIO(photo(0, 160, 200)))
    buffer = io.BytesIO()
    pixels.save(buffer, "JPEG", restart_marker_blocks=1)
    (tmp_path / "links").mkdir()
    write_tar(tmp_path / "links" / "a.tar", [("a.jpg", buffer.getvalue()), ("a.cls", b"1")])
    dataset = open_dataset("photo", str(tmp_path / "links"), 16, 1, tmp_path)
    monkeypatch.setattr("fastvit_engine.data.pixels.jpeg_part.WORTH", 1)
    tops, cut_out = [], jpeg_part.cut_out

    def noted(*args):
        part = cut_out(*args)
        tops.append(part.box.top)
        return part

    monkeypatch.setattr("fastvit_engine.data.pixels.decode.cut_out", noted)
    batches = []
    for variant in VARIANTS[:2]:
        found = list(islice(variant.batches(dataset, 0, True), 20))
        batches.append(torch.stack([images.clone() for images, _ in found]))
        assert any(tops) == (variant.name == "fastvit")
        tops.clear()
    assert torch.equal(*batches) and VARIANTS[1].stages(dataset, 4).decode > 0 and not any(tops)


def _variant(batches, name="peer", packages=(), exact=True):
    return Variant(name, "", packages, lambda size: (size, size, 3), torch.uint8, batches, exact=exact)


def test_variants_that_lose_samples_or_shape_are_refused(dataset):
    def few(dataset, workers, endless):
        yield torch.zeros(39, 16, 16, 3, dtype=torch.uint8), torch.zeros(39)

    def wrong(dataset, workers, endless):
        yield torch.zeros(40, 3, 16, 16, dtype=torch.uint8), torch.zeros(40)

    for batches, message in ((few, "39 of the 40"), (wrong, r"images of \(40, 3, 16, 16\)")):
        with pytest.raises(UserError, match=message):
            measure([dataset], [_variant(batches)], workers=0, rounds=1, images=8, progress=lambda line: None)


def _good(dataset, workers, endless):
    while True:
        yield torch.zeros(40, 16, 16, 3, dtype=torch.uint8), torch.zeros(40)
        if not endless:
            return


def _breaks_at_once(dataset, workers, endless):
    raise OSError("libx.so: cannot open\nmore")
    yield


def _breaks_in_a_round(dataset, workers, endless):
    if endless:
        raise ValueError
    yield from _good(dataset, workers, endless)


def _loses_one(dataset, workers, endless):
    yield torch.zeros(39, 16, 16, 3, dtype=torch.uint8), torch.zeros(39)


PEERS = [
    (_variant(None, "a", ("no_such_package",)), "no_such_package not installed: pip install no_such_package", False),
    (
        replace(_variant(None, "b", ("no_such.part", "torch")), install="such"),
        "no_such.part not installed: pip install such",
        False,
    ),
    (_variant(_breaks_at_once, "c", ("torch",)), "failed: OSError: libx.so: cannot open", True),
    (_variant(_breaks_in_a_round, "d", ("torch",)), "failed: ValueError", True),
    (_variant(_loses_one, "e", ("torch",)), "failed: e gives 39 of the 40 samples of photos", True),
    (_variant(_good, "f", ("torch",)), None, False),
]


def test_a_peer_that_is_absent_or_fails_is_named_and_the_others_go_on(dataset):
    lines = []
    results = measure([dataset], [peer for peer, *_ in PEERS], workers=0, rounds=2, images=8, progress=lines.append)
    assert [(result.skipped, result.failed) for result in results] == [(why, failed) for _, why, failed in PEERS]
    assert [len(result.loaders.get(0, [])) for result in results] == [0, 0, 0, 0, 0, 2]
    assert all(any(why in line for line in lines) for _, why, _ in PEERS if why)


def test_a_peer_that_fails_is_in_the_report_and_the_exit_code(plain_shards, capsys, monkeypatch):
    chosen = [VARIANTS[0], *(peer for peer, *_ in PEERS[:3]), VARIANTS[2]]
    monkeypatch.setattr("benchmarks.data_loading.run.VARIANTS", chosen)
    run = ["bench", "data", str(plain_shards), "--quick", "--image-size", "16", "--workers", "1", "--rounds", "1"]
    assert main(run) == 1
    report = capsys.readouterr().out
    assert all(why in report for _, why, _ in PEERS[:3])


def test_a_peer_that_is_absent_is_no_failure():
    assert not wrong({"results": [{"variant": "a", "skipped": "a not installed", "failed": False}]})
    assert wrong({"results": [{"variant": "a", "skipped": "failed: ValueError", "failed": True}]})


def test_a_decoder_on_the_gpu_is_left_out_without_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert NVJPEG.missing() == "no GPU"


@pytest.mark.parametrize("peer", [DALI, SPDL], ids=lambda peer: peer.name)
def test_dali_and_spdl_give_each_sample_once(peer, tmp_path_factory, write_tar, photo):
    if peer.missing():
        pytest.skip(f"{peer.name} is not installed")
    folder = tmp_path_factory.mktemp("bench") / "links"
    shards = tmp_path_factory.mktemp("labels")
    for first in (0, 12):
        pairs = [((f"a/s.{n}.jpg", photo(n, 40, 50)), (f"a/s.{n}.cls", b"%d" % n)) for n in range(first, first + 12)]
        members = [(name.replace("s.", "s"), content) for pair in pairs for name, content in pair]
        write_tar(shards / f"{first}.tar", members)
    link_shards(str(shards), folder)
    dataset = open_dataset("photos", str(folder), 16, 8, folder)
    for workers in (0, 2):
        found = list(peer.batches(dataset, workers, False))
        assert sorted(label for _, labels in found for label in labels.tolist()) == list(range(24))
        assert all(images.shape == (8, 16, 16, 3) and images.dtype == torch.uint8 for images, _ in found)
    (result,) = measure([dataset], [peer], workers=2, rounds=1, images=32, progress=lambda line: None)
    assert result.skipped is None and result.cpu(2) > 0
    ours = torch.cat([images for images, _ in VARIANTS[0].batches(dataset, 0, False)]).float().mean((0, 1, 2))
    assert torch.cat([images for images, _ in found]).float().mean((0, 1, 2)) == pytest.approx(ours, abs=25)


class _Burner(torch.utils.data.IterableDataset):
    """Batches of 8 images that take 20 ms of CPU each."""

    def __iter__(self):
        while True:
            end = process_time() + 0.02
            while process_time() < end:
                pass
            yield torch.zeros(8, 16, 16, 3, dtype=torch.uint8), torch.zeros(8)


def test_cpu_time_of_workers_counts(dataset):
    def burn(dataset, workers, endless):
        if endless:
            yield from torch.utils.data.DataLoader(_Burner(), batch_size=None, num_workers=workers)
        else:
            yield torch.zeros(40, 16, 16, 3, dtype=torch.uint8), torch.zeros(40)

    (result,) = measure([dataset], [_variant(burn)], workers=1, rounds=1, images=80, progress=lambda line: None)
    ((images, cpu, wall),) = result.loaders[1]
    assert images == 80 and 0.15 < cpu < 1.0  # ten batches, give or take what was under way


def test_speedup_is_taken_within_rounds():
    ours, theirs = Result("d", "a"), Result("d", "b")
    ours.loaders[2] = [LoaderTime(10, 1.0, 1.0), LoaderTime(10, 4.0, 9.0), LoaderTime(20, 2.0, 2.0)]
    theirs.loaders[2] = [LoaderTime(10, 2.0, 1.0), LoaderTime(10, 12.0, 9.0), LoaderTime(10, 4.0, 2.0)]
    assert ours.speedup(theirs, 2) == pytest.approx((3.0, 2.0, 4.0)) and ours.cpu(2) == 0.1
    ours.stages = [StageTimes(1, 2, 3, 0), StageTimes(3, 2, 1, 0)]
    assert ours.stage("read") == 2 and variants.VARIANTS[0].name == "fastvit"


@pytest.mark.parametrize("option", ["--workers", "--image-size", "--repack"])
def test_senseless_numbers_are_refused(option, plain_shards, capsys):
    assert main(["bench", "data", str(plain_shards), "--quick", option, "0"]) == 2
    assert f"{option} is 0" in capsys.readouterr().err
