"""Shards that cannot be reached, listed or located, and what is measured of those that can."""

import os
import shutil
import socket
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from fastvit_engine.config import load_config
from fastvit_engine.data.shards.index import write_index
from fastvit_engine.distributed.supervise import free_port
from fastvit_engine.doctor import data
from fastvit_engine.doctor.data import check_data, check_reachable
from fastvit_engine.doctor.decoding import Needs
from fastvit_engine.doctor.findings import Status

NO_GPU = Needs(None, 0, 2.0)


def check(pattern, *settings, needs=NO_GPU, classes_known=False, out="run"):
    """The findings by subject."""
    config = load_config(None, [f"data.train={pattern}", "model.image_size=16", "model.name=Ti/4", *settings]).config
    return {one.subject: one for one in check_data(config, out, needs, classes_known=classes_known)}


@pytest.fixture
def alone(monkeypatch):
    """No proxy answers for servers that are not there."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def answering():
    """answering(status, body) -> the URL of a server that answers so."""
    servers = []

    def start(status, body=b""):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=partial(servers[-1].serve_forever, 0.01), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_nobody_listens_at_the_port(alone):
    finding = check_reachable("store", f"http://127.0.0.1:{free_port()}/x-{{000..100}}.tar")
    assert finding.status == Status.PROBLEM
    assert finding.found == "127.0.0.1 cannot be reached: [Errno 111] Connection refused"


def test_a_name_that_no_server_has(alone):
    finding = check_reachable("store", "https://me:secret@nowhere.invalid/x.tar")
    assert finding.status == Status.PROBLEM
    assert finding.found.startswith("nowhere.invalid cannot be reached: ")
    assert "secret" not in finding.found


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_a_black_hole_ends_in_seconds(alone, monkeypatch, scheme):
    """A server that takes the connection and never answers, as a firewall or a dead proxy does."""
    pytest.importorskip("obstore", reason="needs obstore: pip install obstore")
    monkeypatch.setattr(data, "_ANSWER", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as hole:
        address = f"127.0.0.1:{hole.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            monkeypatch.setenv(name, "us-east-1")
        began = time.monotonic()
        finding = check_reachable("store", f"http://{address}/x.tar" if scheme == "http" else "s3://bucket/x.tar")
    assert finding.status == Status.PROBLEM and " cannot be reached: no answer for 0.5 seconds" in finding.found
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(("status", "words"), [(403, "HTTP 403 Forbidden"), (404, "HTTP 404 Not Found")])
def test_a_server_that_refuses(alone, answering, status, words):
    url = f"{answering(status)}/x.tar?signature=secret"
    finding = check_reachable("store", url)
    assert finding.found == f"127.0.0.1 does not serve {url.partition('?')[0]}: {words}"
    assert finding.advice == "check its name, and this node's access to it"


def test_credentials_that_are_missing(alone, monkeypatch, tmp_path):
    pytest.importorskip("obstore", reason="needs obstore: pip install obstore")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    finding = check_reachable("store", "s3://bucket/x.tar")
    assert finding.found == "bucket does not serve s3://bucket/x.tar: no credentials were found"
    assert finding.advice.startswith("set those of the store")


def test_an_unknown_kind_of_storage_and_a_command():
    finding = check_reachable("store", "hdfs://x/y.tar")
    assert finding.status == Status.PROBLEM
    assert finding.advice.startswith("hdfs:// is not a kind of storage that is known; use s3://, ")
    assert check_reachable("store", "pipe:cat x.tar").status == Status.OK


def test_a_folder_that_this_node_does_not_have(tmp_path):
    for name in ("x.tar", "*/x.tar", "x-{0..9}.tar"):
        finding = check_reachable("store", f"{tmp_path}/none/{name}")
        assert finding.found == f"{tmp_path}/none does not exist on this node"
    assert check_reachable("store", f"{tmp_path}/*/x.tar").status == Status.OK


def test_shards_of_this_machine(shards, tmp_path):
    shards = shutil.copytree(shards, tmp_path / "shards", ignore=shutil.ignore_patterns("*.index"))
    found = check(shards)
    assert found["training shards"].found == f"7 shards in {shards}"
    assert found["training index"].found == "there is none yet beside the shards"
    assert not list(shards.glob("*.index")), "nothing is written"
    assert found["reading"].figures["bytes_per_second"] > 0
    assert found["decoding"].figures["images_per_second_per_core"] > 0
    assert "the first images of the shards" in found["decoding"].found
    assert {one.status for one in found.values()} == {Status.OK, Status.NOTE}


def test_the_index_that_a_run_would_use(shards, tmp_path):
    for path in shards.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    paths = sorted(map(str, tmp_path.glob("*.tar")))
    write_index(paths, tmp_path / "shards.index")
    assert check(tmp_path)["training index"].found == f"35 samples, by {tmp_path}/shards.index"
    assert check(f"{tmp_path}/shards.index")["training index"].found == f"{tmp_path}/shards.index is one"
    (tmp_path / "extra.index").write_bytes(b"no index")
    refused = check(tmp_path, f"data.index={tmp_path}/extra.index")["training index"]
    assert refused.found == f"{tmp_path}/extra.index is not a whole index"


def test_remote_shards_without_an_index_are_a_problem(alone, answering, shards):
    body = sorted(shards.glob("*.tar"))[0].read_bytes()
    found = check(f"{answering(200, body)}/x-{{0..1}}.tar")
    assert found["training index"].status == Status.PROBLEM
    assert (
        "run `fastvit data index SHARDS --out FILE.index` and set data.index=FILE.index"
        in found["training index"].advice
    )
    assert found["reading"].status == Status.OK, "what can be measured is measured all the same"
    assert found["decoding"].status == Status.OK


def test_no_shards_and_damaged_shards(tmp_path):
    assert "matches no shards" in check(tmp_path)["training shards"].found
    (tmp_path / "x.tar").write_bytes(b"x" * 3000)
    finding = check(tmp_path)["decoding"]
    assert finding.status == Status.PROBLEM
    assert finding.found.startswith(f"shard {tmp_path}/x.tar is damaged")


def test_samples_that_training_cannot_use(shards):
    finding = check(shards, "data.label_key=wrong")["decoding"]
    assert finding.status == Status.PROBLEM
    assert finding.found == "none of 5 samples has a label and an image that training can use"
    some = check(shards, "model.num_classes=2", classes_known=True)["samples"]
    assert some.status == Status.WARNING
    assert some.found.endswith("have no label or image that training can use")


def test_evaluation_shards_are_checked_too(shards, tmp_path):
    found = check(shards, f"data.eval={tmp_path}/gone/x.tar")
    assert found["evaluation data"].found == f"{tmp_path}/gone does not exist on this node"


def test_a_list_is_asked_for_what_it_names(alone, tmp_path):
    (tmp_path / "list.txt").write_text(f"http://127.0.0.1:{free_port()}/x-{{0..9}}.tar\n")
    finding = check(f"@{tmp_path}/list.txt")["training data"]
    assert finding.found == "127.0.0.1 cannot be reached: [Errno 111] Connection refused"
    assert check_reachable("store", f"@{tmp_path}/none.txt").status == Status.PROBLEM


def test_the_store_of_a_run_folder_is_asked_too(shards):
    finding = check(shards, out="s3://")["run folder"]
    assert finding.found == "s3:// names no bucket"


def test_several_sources_are_told_apart(shards, tmp_path):
    found = check(f"[{{shards: {shards}, weight: 1}}, {{shards: {tmp_path}/gone/x.tar, weight: 1}}]")
    assert found["training shards 1"].status == Status.OK
    assert found["training data 2"].status == Status.PROBLEM
