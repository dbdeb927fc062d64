"""The examination as a whole: on one machine, and by the ranks of a job, which report once."""

import json
import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from fastvit_engine.cli import main
from fastvit_engine.config import Config, load_config
from fastvit_engine.distributed import rendezvous
from fastvit_engine.distributed.supervise import free_port, rank_environment
from fastvit_engine.doctor import examine, links
from fastvit_engine.doctor.findings import Group, Status
from fastvit_engine.doctor.isolated import Isolated, stopping
from fastvit_engine.errors import UserError
from fastvit_engine.models import parameter_count
from tests.fastvit_engine.doctor.limits import Limit

pytestmark = pytest.mark.distributed
software = Group("software")
REPOSITORY = Path(__file__).parents[3]


def test_a_check_that_hangs_or_crashes_leaves_the_rest_of_the_report(monkeypatch):
    limit = Limit("S")

    def hang():
        yield software.ok("torch", "2.13")
        limit.near()
        time.sleep(600)

    def fail():
        raise ImportError("no module")
        yield

    with monkeypatch.context() as patched:
        patched.setattr(examine, "run_isolated", limit.run)
        first, last = examine.run_check("data", hang, 0.3)
    assert first == software.ok("torch", "2.13")
    assert (last.group, last.status) == ("data", Status.PROBLEM)
    assert (last.subject, last.found) == ("rest of data", "could not be checked: it did not end within 0.3 s")
    assert last.advice == "see that the store or the disk with the shards answers, and try again"
    (only,) = examine.run_check("data", fail, 20)
    assert only.found.endswith("it failed: ImportError: no module")
    assert only.advice.startswith("fix what it names")


@pytest.mark.parametrize("name", ["B/16", "L/16", "H/14", "R50+B/16", "R+Ti/16", "R50x1", "R152x2"])
def test_the_room_for_a_checkpoint_is_about_that_of_all_parameters(name):
    config = Config(model={"name": name, "image_size": 224})
    assert examine.checkpoint_bytes(config) == pytest.approx(12 * parameter_count(config.model), rel=0.01)


@pytest.mark.parametrize(
    ("settings", "per_parameter"),
    [
        ({"optimizer": {"kind": "sgd"}}, 8),
        ({"optimizer": {"kind": "sgd", "momentum": 0}}, 4),
        ({"optimizer": {"kind": "lion"}}, 8),
        ({"optimizer": {"kind": "muon"}}, 8),  # the patch projection and the head, which have more, are 2 % of H/14
        ({"optimizer": {"kind": "lamb"}}, 12),
        ({"optimizer": {"kind": "adafactor"}}, 6),
        ({"optimizer": {"frozen": "backbone"}}, 4),
        ({"optimizer": {"kind": "lion"}, "ema": {"decay": 0.999}}, 12),
    ],
)
def test_the_room_for_a_checkpoint_is_what_its_optimizer_and_average_keep(settings, per_parameter):
    config = Config(model={"name": "H/14", "image_size": 224, "num_classes": 10}, **settings)
    assert examine.checkpoint_bytes(config) == pytest.approx(per_parameter * parameter_count(config.model), rel=0.01)


def test_a_check_that_still_computes_at_its_limit_is_slow_and_no_problem(monkeypatch):
    limit = Limit("R")

    def compute():
        limit.near()
        while True:
            pass
        yield

    monkeypatch.setattr(examine, "run_isolated", limit.run)
    (only,) = examine.run_check("disks", compute, 0.3)
    assert (only.subject, only.status) == ("rest of disks", Status.WARNING)
    assert only.found.startswith("slow: it did not end within 0.3 s, and was still computing; ")
    assert only.advice == "run this again when the machine has less to do"


@pytest.mark.parametrize(
    ("settings", "workers"),
    [([], 1), (["data.num_workers=0"], 0), (["data.num_workers=9"], 9), (["data.order=stream"], 4)],
)
def test_open_data_workers_count_as_a_run_takes_them(monkeypatch, settings, workers):
    """It fits them to the cores, but for an order that depends on them."""
    seen = []
    monkeypatch.setattr("fastvit_engine.doctor.host.check_host", lambda *given: seen.append(given) or ())
    (check,) = [check for check in examine.CHECKS if check.name == "host"]
    config = load_config(None, settings).config
    check.run(examine.Request(config, "run", classes_known=False), examine.Gpus(2))
    assert seen == [(2, workers, 2)]


@pytest.fixture
def quick(monkeypatch):
    """All checks but those of the compilers, which import DeepSpeed; small messages."""
    monkeypatch.setattr(examine, "CHECKS", [check for check in examine.CHECKS if check.name != "compilers"])
    monkeypatch.setattr(links, "_BYTES", {"cpu": 2**16})
    monkeypatch.setattr(links, "_SECONDS", 0.05)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # which no fork of this process could use
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_one_machine(quick, shards, tmp_path, capsys):
    code = main(["doctor", "--data", str(shards), "--set", "model.image_size=16", "--out", f"{tmp_path}/run", "--json"])
    report = json.loads(capsys.readouterr().out)
    found = {(one["group"], one["subject"]): one for one in report["findings"]}
    assert {group for group, _ in found} >= {"software", "host", "disks", "GPUs", "kernels", "data", "links"}
    assert found["links", "all-reduce"]["figures"]["bytes_per_second"] > 0
    assert found["data", "decoding"]["status"] == "ok"
    assert found["disks", "run folder"]["found"].endswith(f"{tmp_path}/run")
    assert not (tmp_path / "run").exists()
    assert report["hosts"] == [socket.gethostname()]
    assert code == (1 if report["problems"] else 0)


def test_a_problem_is_exit_code_1_and_comes_last(quick, monkeypatch, capsys, tmp_path):
    only = [check for check in examine.CHECKS if check.name == "data"]
    monkeypatch.setattr(examine, "CHECKS", only)
    monkeypatch.setattr(examine, "_of_links", lambda tell: iter(()))
    assert main(["doctor", "--data", f"{tmp_path}/gone/x.tar"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "PROBLEMS" and lines[-1].startswith("1 problem, 0 warnings")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data", " "], "it is empty"),
        (["--data", "s3:/bucket/x"], "is no URL: write s3://bucket/x"),
        (["--recipe", "vit_b17"], "vit_b17"),
        (["--set", "data.nothing=1"], "data.nothing"),
        (["--out", "https://host/run"], "is on a web server"),
        (["--data", "x", "--set", "data.train=y"], "say the same thing twice"),
    ],
)
def test_bad_usage_is_exit_code_2_before_anything_is_checked(monkeypatch, capsys, words, sentence):
    monkeypatch.setattr(examine, "CHECKS", None)
    try:
        code = main(["doctor", *words])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert sentence in capsys.readouterr().err


def test_a_machine_without_pytorch_is_told_so():
    """An interpreter that sees no package at all."""
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-S", "-m", "fastvit_engine", "doctor", "--json", "--recipe", "quickstart"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    found = {one["subject"]: one for one in json.loads(done.stdout)["findings"]}
    assert found["torch"]["found"] == "torch is not installed, and training needs it"
    assert found["torch"]["advice"].startswith("pip install 'fastvit-engine[train]'")
    assert found["left out"]["found"] == "not checked without torch: GPUs, compilers, kernels, data"
    assert found["cores"]["status"] in ("ok", "note")


# ---- as ranks of a job, each on a host of its own


def rank(number, port, ranks, of_rank, send):
    """What a launcher starts: examines, and sends what it would report."""
    os.environ.update({**rank_environment(number, ranks, port), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(ranks)})
    socket.gethostname = lambda: f"node-{number}"
    links._BYTES, links._SECONDS = {"cpu": 2**16}, 0.05
    torch.cuda.is_available = lambda: False
    of_rank(number)
    found = examine.examine(examine.Request(None, "run", classes_known=False))
    send(None if found is None else [(one.finding.to_dict(), one.hosts) for one in found])


def reports(ranks, of_rank, started=None):
    """What each rank reports: {(subject, status): (found, hosts)}, or None."""
    port, numbers = free_port(), range(ranks if started is None else started)
    with stopping([Isolated(partial(rank, n, port, ranks, of_rank), 60) for n in numbers]) as running:
        outcomes = [one.wait() for one in running]
    assert [one.failure for one in outcomes] == [None] * len(outcomes)
    return [
        found and {(one["subject"], one["status"]): (one["found"], hosts) for one, hosts in found}
        for ((found,), _) in ((one.messages, one.failure) for one in outcomes)
    ]


def only(*findings):
    """Replaces all checks."""
    examine.CHECKS = [examine.Check("software", lambda request, gpus: findings, 20.0, needs_torch=False)]


def test_one_report_of_two_nodes_with_other_versions_and_clocks():
    def of_rank(number):
        version = ["2.13.0", "2.12.0"][number]
        only(software.ok("torch", version, same=version), software.ok("apex", "none"))
        examine.exchange = partial(examine.exchange, clock=lambda: time.time() + 5 * number)

    first, second = reports(2, of_rank)
    assert second is None
    assert first["torch", "problem"][0] == "differs between nodes: 2.13.0 on node-0; 2.12.0 on node-1"
    assert first["apex", "ok"] == ("none", ["node-0", "node-1"])
    assert first["clocks", "warning"][0].startswith("node-1 is ")
    assert "ahead of node-0" in first["clocks", "warning"][0]
    assert first["all-reduce", "ok"][0].endswith("by Gloo on 2 processes of 2 nodes (bus bandwidth)")
    assert ("between nodes", "ok") in first


def test_a_node_that_never_starts_is_named_and_the_rest_is_reported():
    def of_rank(number):
        only(software.ok("torch", "2.13.0"))
        examine._PATIENCE = 1.0

    (report,) = reports(2, of_rank, started=1)
    assert ("torch", "ok") in report
    assert report["exchange", "problem"][0].startswith(
        "the nodes did not find each other: it failed: rank 1 of 2 did not start within 1 s"
    )


def test_a_rank_that_cannot_join_says_why_on_rank_0():
    def of_rank(number):
        only(software.ok("torch", "2.13.0"))

        def refuse(patience):
            raise UserError("the name of this host, node-1, resolves to 127.0.1.1: correct /etc/hosts")

        if number == 1:
            rendezvous.check_rendezvous = refuse

    first, second = reports(2, of_rank)
    assert second is None
    found, hosts = first["exchange", "problem"]
    assert " has ended: the name of this host, node-1, resolves to 127.0.1.1: correct /etc/hosts" in found
    assert hosts == ["node-0"]


def test_variables_of_a_launcher_that_is_not_whole(quick, monkeypatch, capsys):
    monkeypatch.setattr(examine, "CHECKS", [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "the launch environment sets WORLD_SIZE but not RANK" in out
    assert "start with torchrun" in out
