"""What the benchmark of remote reads serves and reports."""

from pathlib import Path

from benchmarks.remote_reads import TITLES, ratios, report, serving
from fastvit_engine.data.check.speed import LoaderTime
from fastvit_engine.storage import ShardStorage


def test_the_server_serves_what_the_loader_asks(tmp_path: Path, monkeypatch) -> None:
    content = bytes(range(256)) * 1000
    (tmp_path / "a.tar").write_bytes(content)
    with serving(tmp_path, 0.0) as endpoint:
        for name, value in {"ENDPOINT_URL": endpoint, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        storage = ShardStorage(["s3://bucket/a.tar"], [len(content)])
        assert storage.read(0, 100, 100_000) == content[100:100_100]
        assert storage.counters().retries == 0


def test_ratios_compare_the_same_round() -> None:
    taken = {name: [LoaderTime(100, 1.0, 2.0), LoaderTime(100, 2.0, 2.0)] for name in TITLES}
    taken["s3"] = [LoaderTime(100, 2.0, 4.0), LoaderTime(100, 2.0, 1.0)]
    assert ratios(taken, "s3", "cpu") == [0.5, 1.0] and ratios(taken, "s3", "wall") == [0.5, 2.0]
    record = dict.fromkeys(("command", "started", "workers", "image_size", "rounds", "images"), 1)
    text = report(record | {"environment": {"cpu": "c"}, "load_average": [9.0, 9.0]}, taken)
    assert "0.75, missed" in text and "1.00, reached" in text and "Other work ran on the machine" in text
