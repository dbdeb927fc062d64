"""Names from data, shown on a terminal: as what they are, and never as commands to it."""

import json
import sys

import pytest

from fastvit_engine.cli import main
from fastvit_engine.data.stream.batch import BadSample
from fastvit_engine.observe.progress import Display, TrainingProgress
from fastvit_engine.train.health.bad_samples import BadSamples
from tests.fastvit_engine.conftest import TINY_RUN

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp\r\n"  # a title, an erased screen, a colour, a reversed name, a line
SHOWN = r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp"


def obeyed(text: str) -> list[str]:
    """The characters that a terminal would obey."""
    return [c for c in text if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 or c in "\u202e\u2066"]


@pytest.fixture
def folder(tmp_path, write_tar, photo):
    """Shards in a folder with a name, a file name, sample keys, members and class names that all hold escapes."""
    folder = tmp_path / "a\x1b[1mb"
    folder.mkdir()
    name = "train-\x1b[5m0.tar"
    members = [
        (f"{EVIL}{number}.{kind}", content)
        for number in range(6)
        for kind, content in (
            ("jpg", photo(number) if number else b"no image"),
            ("cls", str(number % 2).encode()),
            ("\x1b[7mtxt", b"x"),
        )
    ]
    write_tar(folder / name, members)
    part = {"samples": 6, "shards": {name: 6}}
    info = {
        "classes": [EVIL, f"b{EVIL}"],
        "source": EVIL,
        "seed": 0,
        "eval_fraction": 0.1,
        "samples_per_shard": 6,
        "train": part,
        "eval": {"samples": 0, "shards": {}},
    }
    (folder / "dataset.json").write_text(json.dumps(info))
    return folder


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        (["data", "stats"], [r"\x1b]0;owned\x07\x1b[2J"]),
        (["data", "verify"], [SHOWN, r"train-\x1b[5m0.tar"]),
        (["data", "stats", "--json"], []),
        (["data", "verify", "--json"], []),
    ],
)
def test_stats_and_verify(folder, capfd, command, parts):
    assert main([*command, str(folder), "--workers", "1"]) in (0, 1)
    printed = "".join(capfd.readouterr())
    assert obeyed(printed) == []
    for part in parts:
        assert part in printed
    if "--json" in command:
        json.loads(printed)


@pytest.mark.parametrize(
    "settings",
    [
        ["data.image_key=png"],  # an error that names a sample and its members
        ["data.label_key=\x1b[2Jtxt"],
        ["data.order=stream", "data.image_key=png"],
        ["name=\x1b[2J", "data.trein=\x1b[2J"],
    ],
)
def test_errors_of_training(folder, capfd, tmp_path, monkeypatch, settings):
    monkeypatch.delenv("RANK", raising=False)
    everything = [f"data.train={folder}", *TINY_RUN, "train.global_batch_size=2", *settings]
    words = [word for setting in everything for word in ("--set", setting)]
    assert main(["train", "quickstart", "--out", str(tmp_path / "run"), *words]) == 2
    printed = "".join(capfd.readouterr())
    assert "fastvit: error:" in printed and obeyed(printed) == []


def test_arguments_that_are_refused(capfd):
    with pytest.raises(SystemExit):
        main(["train", "quickstart", f"--{EVIL}"])
    with pytest.raises(SystemExit):
        main([EVIL])
    assert obeyed("".join(capfd.readouterr())) == []


def test_progress_and_bad_samples(tmp_path, capfd):
    display = Display(sys.stderr)
    display.print(f"left out: {EVIL}")
    display.live = True
    display.draw(EVIL)
    display.leave()
    TrainingProgress(10).message(f"left out: {EVIL}")
    printed = "".join(capfd.readouterr()).replace("\r", "", 1).replace("\x1b[K", "", 1)  # its own
    assert obeyed(printed) == [] and SHOWN in printed

    class Recorder:
        def message(self, text: str) -> None:
            assert obeyed(text) == [] and "\n" not in text and SHOWN in text

    samples = BadSamples(tmp_path / "bad.jsonl", 1.0)
    samples._name([BadSample(EVIL, EVIL, EVIL)], Recorder())  # type: ignore[arg-type]
    assert obeyed((tmp_path / "bad.jsonl").read_text()) == []
