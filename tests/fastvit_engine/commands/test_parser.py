"""Arguments that must be on this machine are refused if they are URLs, before any work and by every command."""

from pathlib import Path

import pytest

from fastvit_engine.cli import main
from fastvit_engine.commands.parser import local_path

COMMANDS = [
    ["data", "make", "SOURCE", "--out", "URL"],
    ["data", "make", "URL", "--out", "out"],
    ["data", "make", "SOURCE", "--out", "out", "--eval-source", "URL"],
    ["data", "make", "SOURCE", "--out", "out", "--classes", "URL"],
    ["data", "index", "SOURCE", "--out", "URL.index"],
    ["data", "stats", "SOURCE", "--sheet", "URL.png"],
    ["data", "show", "photos", "--sheet", "URL.png"],
    ["train", "quickstart", "--out", "URL"],
    ["export", "SOURCE", "--out", "URL.safetensors"],
    ["report", "URL"],
    ["stacks", "URL"],
    ["bench", "data", "--out", "URL"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("url", ["s3://bucket/x", "gs://bucket/x", "https://host/x", "memory:/x"])
def test_a_url_in_place_of_a_local_path(command, url, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([word.replace("URL", url) for word in command])
    assert ended.value.code == 2 and not list(tmp_path.iterdir())
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and f"{url}" in message and "is a URL, and this must be on this machine" in message


@pytest.mark.parametrize("path", ["runs/b16", "/data/a:b", "a:/b", "~/x", "s3", "with space/x", "{a,b}/*.tar", "c:"])
def test_a_local_path_stays_as_it_is(path):
    assert local_path(path) == Path(path)


def test_a_file_url_is_its_path():
    assert local_path("file:///data/x") == local_path("file:/data/x") == Path("/data/x")


@pytest.mark.parametrize(
    "command",
    [
        ["data", "verify", "x", "--workers", "0"],
        ["data", "stats", "x", "--workers", "-1"],
        ["data", "index", "x", "--out", "y", "--processes", "0"],
    ],
)
def test_no_processes_would_look_at_nothing(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2 and "is less than 1" in capsys.readouterr().err
