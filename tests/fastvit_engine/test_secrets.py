"""A secret in the URL of shards, from the command line to the last file of a run: it is used, and appears nowhere."""

import base64
import secrets
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fastvit_engine.cli import main
from fastvit_engine.data.shards.index import open_index, write_index
from fastvit_engine.data.stream.prepare import prepare_data
from fastvit_engine.errors import UserError
from tests.fastvit_engine.conftest import TINY_RUN
from tests.fastvit_engine.storage.fault_server import FaultServer
from tests.fastvit_engine.warm_ranks import run_ranks


@pytest.fixture
def server(digits: Path) -> Iterator[FaultServer]:
    with FaultServer({f"/{path.name}": path.read_bytes() for path in digits.glob("*.tar")}).running() as server:
        yield server


def train_arguments(url: str, index: Path, out: Path, *settings: str, resume: str = "never") -> list[str]:
    everything = [
        f"data.train={url}",
        f"data.eval={url}",
        "data.allow_overlap=true",
        f"data.index={index}",
        *TINY_RUN[:-3],
        *settings,
    ]
    return [
        *("train", "quickstart", "--out", str(out), "--resume", resume),
        *(word for setting in everything for word in ("--set", setting)),
    ]


@pytest.mark.slow
def test_a_secret_in_a_url_is_in_no_file_and_no_line(server, tmp_path, capfd):
    words = [secrets.token_urlsafe(12) for _ in range(4)]
    user, password, signature, other = words
    plain = server.url("/train-{000000..000007}.tar")
    url = plain.replace("://", f"://{user}:{password}@") + f"?X-Amz-Signature={signature}&token={signature}#{signature}"
    index, run, log = tmp_path / "x.index", tmp_path / "run", tmp_path / "log"

    assert main(["data", "index", url, "--out", str(index)]) == 0
    assert open_index(index).shards == [server.url(f"/train-00000{number}.tar") for number in range(8)]
    assert main(["config", "show", "quickstart", "--set", f"data.train={url}"]) == 0

    settings = ["train.duration=4 steps", "evaluate.every=4 steps", "checkpoint.every=2 steps"]
    assert run_ranks(train_arguments(url, index, run, *settings), 1, log), log.read_text()
    asked = {headers.get("Authorization") for headers in server.headers}
    assert asked == {"Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}  # it was used
    signed_again = url.replace(signature, other)
    longer = ["train.duration=6 steps", *settings[1:]]
    assert run_ranks(train_arguments(signed_again, index, run, *longer, resume="auto"), 1, log), log.read_text()
    assert "continuing" in log.read_text()

    assert main(["report", str(run)]) == 0
    server.always = dict.fromkeys(server.files, ("status", 404))
    streamed = ["data.index=null", "data.order=stream", *settings]
    assert main(train_arguments(url, index, tmp_path / "other", *streamed)) in (1, 2)
    assert main(["data", "index", url, "--out", str(tmp_path / "y.index")]) == 2
    assert main(["data", "verify", url, "--workers", "1"]) == 1
    assert main(["train", "quickstart", "--set", f"data.trein={url}"]) == 2

    output = "".join(capfd.readouterr()) + log.read_text()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    written = {"config.yaml", "environment.json", "events.jsonl", "report.html", "x.index"}
    assert written <= {path.name for path in files}
    for word in words:
        assert word not in output
        assert [path for path in files if word.encode() in path.read_bytes()] == []
        assert [path for path in tmp_path.rglob("*") if word in path.name] == []
    assert server.url("/train-000000.tar") in output and plain in (run / "config.yaml").read_text()


# ---- an index keeps no secrets: how a server that asks for them is read


@pytest.fixture
def guarded(shards: Path) -> Iterator[str]:
    """The address of a server that gives its files to user "me" with password "word" only."""
    right = "Basic " + base64.b64encode(b"me:word").decode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = (shards / self.path.lstrip("/")).read_bytes()
            known = self.headers.get("Authorization") == right
            first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            part = content[int(first) : int(last) + 1 if last else None] if known else b""
            self.send_response(206 if known else 401)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_without_its_password_a_server_refuses_and_the_advice_helps(guarded, make_config, tmp_path):
    url, index = f"http://me:word@{guarded}/part-{{0..6}}.tar", tmp_path / "x.index"
    write_index([f"http://me:word@{guarded}/part-{number}.tar" for number in range(7)], index)
    advice = (
        r"cannot be read \(HTTP 401 Unauthorized\): give user name and password, or the signature, in the URLs of "
        "data.train or data.eval; an index keeps neither, so set data.index to it"
    )
    with pytest.raises(UserError, match=advice):
        prepare_data(make_config(index), world_size=1, index_folder=tmp_path)
    data = prepare_data(
        make_config(url, eval=url, index=str(index), allow_overlap=True), world_size=1, index_folder=tmp_path
    )
    assert data.samples_per_epoch == 35


def test_an_index_that_is_made_again_reads_only_what_has_changed(guarded, tmp_path):
    """Under another password, too: a shard is known by its public URL."""
    shards = [f"http://me:word@{guarded}/part-{number}.tar" for number in range(7)]
    index = write_index(shards, tmp_path / "x.index")
    assert index.find([f"{shard}?sig=1" for shard in shards]) == list(range(7))


def test_shards_that_differ_in_their_query_only_are_refused(guarded, tmp_path):
    shards = [f"http://me:word@{guarded}/part-0.tar?number={number}" for number in range(2)]
    with pytest.raises(UserError, match=r"two shards are http://127.0.0.1:\d+/part-0.tar without what follows '\?'"):
        write_index(shards, tmp_path / "x.index")
    assert not (tmp_path / "x.index").exists()
