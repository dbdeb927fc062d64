"""Arguments that must be on this machine are refused if they are URLs, before any work and by every command."""

from pathlib import Path

import pytest

from fastvit_engine import train
from fastvit_engine.cli import main
from fastvit_engine.commands.parser import local_path
from fastvit_engine.errors import UserError

WRITING = [
    ["data", "make", "SOURCE", "--out", "URL"],
    ["data", "index", "SOURCE", "--out", "URL.index"],
    ["data", "stats", "SOURCE", "--sheet", "URL.png"],
    ["data", "show", "photos", "--sheet", "URL.png"],
]
READING = [
    ["data", "make", "URL", "--out", "out"],
    ["data", "make", "SOURCE", "--out", "out", "--eval-source", "URL"],
    ["data", "make", "SOURCE", "--out", "out", "--classes", "URL"],
]
LOCAL = [
    ["export", "SOURCE", "--out", "URL.safetensors"],
    ["bench", "data", "--out", "URL"],
]


@pytest.mark.parametrize("command", LOCAL, ids=" ".join)
@pytest.mark.parametrize("url", ["s3://bucket/x", "gs://bucket/x", "https://host/x", "memory:/x"])
def test_a_url_in_place_of_a_local_path(command, url, tmp_path, monkeypatch, capsys):
    message = _refusal(command, url, tmp_path, monkeypatch, capsys)
    assert url in message and "is a URL, and this must be on this machine" in message


def _refusal(command, url, folder, monkeypatch, capsys) -> str:
    """The sentence with which a command ends before any work."""
    monkeypatch.chdir(folder)
    try:
        code = main([word.replace("URL", url) for word in command])
    except SystemExit as ended:
        code = ended.code
    message = capsys.readouterr().err
    assert code == 2 and not list(folder.iterdir()) and message.count("\n") == 1
    return message


@pytest.mark.parametrize("command", WRITING, ids=" ".join)
def test_a_web_server_is_not_written_to(command, tmp_path, monkeypatch, capsys):
    message = _refusal(command, "https://me:secret@host/x", tmp_path, monkeypatch, capsys)
    assert "https://host/x" in message and "is on a web server, which is only read: name a local path" in message
    assert "secret" not in message


@pytest.mark.parametrize("command", [*WRITING, *READING], ids=" ".join)
def test_a_url_that_lacks_a_slash(command, tmp_path, monkeypatch, capsys):
    assert "is no URL: write s3://bucket/x" in _refusal(command, "s3:/bucket/x", tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("command", [["train", "quickstart", "--out", "URL"], ["report", "URL"], ["stacks", "URL"]])
@pytest.mark.parametrize("url", ["hdfs://host/x", "https://me:secret@host/x", "memory:/x"])
def test_a_run_folder_is_on_this_machine_or_in_an_object_store(command, url, tmp_path, monkeypatch, capsys):
    message = _refusal(command, url, tmp_path, monkeypatch, capsys)
    shown = url.replace("me:secret@", "").replace("memory:/", "memory://")
    assert f"the run folder is {shown}, which no run can be written to: name a local folder, or an object" in message
    with pytest.raises(UserError, match=r"name a local folder, or an object store \(s3://"):
        train("quickstart", url)
    assert not list(tmp_path.iterdir())


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


def test_stacks_of_a_run_on_another_machine(tmp_path, monkeypatch, capsys):
    pytest.importorskip("obstore")
    monkeypatch.setenv("FASTVIT_RUNS", str(tmp_path / "runs"))
    assert main(["stacks", "s3://bucket/run"]) == 2
    message = capsys.readouterr().err
    assert "no process of s3://bucket/run has a working folder here" in message and "FASTVIT_RUNS" in message
    assert not list(tmp_path.iterdir())
