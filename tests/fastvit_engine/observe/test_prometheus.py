"""What Prometheus gets of a run, and that the dashboard asks for nothing else."""

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastvit_engine.errors import UserError
from fastvit_engine.observe.events import record_event
from fastvit_engine.observe.prometheus import Exporter, HostFigures, check_installed, served
from fastvit_engine.observe.run_folder import RunFolder
from tests.fastvit_engine.observe.conftest import eval_row, few_shot_row, loss_row, own_row, train_row
from tests.in_full import only_in_full

pytest.importorskip("prometheus_client", reason="needs prometheus_client: pip install prometheus-client")
DASHBOARD = Path(__file__).parents[3] / "launch" / "grafana" / "fastvit.json"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return str(answer.read().decode())


def figures(port: int) -> dict[str, float]:
    lines = [line for line in get(port, "/metrics").splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


@pytest.fixture
def exporter() -> Exporter:
    return Exporter('b16 "x"')


@pytest.fixture
def port(exporter: Exporter) -> Iterator[int]:
    port = free_port()
    with served(exporter, "127.0.0.1", port):
        yield port


def fill(exporter: Exporter) -> None:
    exporter.total_steps = 840
    exporter.hosts = lambda: [HostFigures("node-0", 7, 0.5, 0.25), HostFigures("node-1", 6, 4.0, None)]
    exporter.write(train_row(7, bad_samples=2))
    exporter.write(eval_row(6, 0.75))
    exporter.write(eval_row(6, 0.5, eval="eval_ema", top5=None))
    exporter.write(few_shot_row(6, 0.25, 0.5, eval="fewshot_ema"))
    exporter.write(own_row(6, "mine_ema", recall=0.5))


def test_a_figure_is_served_from_when_it_is_known(exporter: Exporter, port: int) -> None:
    first = figures(port)
    assert set(first) == {f'fastvit_run_info{{run="b16 \\"x\\"",version="{version()}"}}'}
    exporter.write(train_row(7, mfu=None, grad_norm=float("nan")))
    found = figures(port)
    assert found["fastvit_step"] == 7 and found["fastvit_grad_norm"] != found["fastvit_grad_norm"]
    assert "fastvit_mfu_ratio" not in found and "fastvit_bad_samples" not in found


def test_a_held_out_loss_without_accuracy_is_served_alone(exporter: Exporter, port: int) -> None:
    exporter.write(loss_row(6, 0.5))
    found = figures(port)
    assert found['fastvit_eval_loss{weights="model"}'] == 0.5 and found['fastvit_eval_step{weights="model"}'] == 6
    assert not any("top1" in name for name in found)


def version() -> str:
    import fastvit_engine

    return fastvit_engine.__version__


def test_every_row_and_machine_has_its_figures(exporter: Exporter, port: int) -> None:
    fill(exporter)
    found = figures(port)
    assert found["fastvit_loss"] == pytest.approx(2 / 7) and found["fastvit_learning_rate"] == 1e-3
    assert found["fastvit_total_steps"] == 840 and found["fastvit_bad_samples"] == 2
    assert abs(found["fastvit_last_row_timestamp_seconds"] - time.time()) < 60
    assert found['fastvit_eval_top1_ratio{weights="model"}'] == 0.75
    assert found['fastvit_eval_top1_ratio{weights="ema"}'] == 0.5
    assert 'fastvit_eval_top5_ratio{weights="ema"}' not in found
    assert found['fastvit_fewshot_accuracy_ratio{shots="5",weights="ema"}'] == 0.5
    assert found['fastvit_evaluator_figure{evaluator="mine",figure="recall",weights="ema"}'] == 0.5
    assert found['fastvit_host_step{host="node-1"}'] == 6 and found['fastvit_host_silent_seconds{host="node-1"}'] == 4
    assert found['fastvit_host_work_ratio{host="node-0"}'] == 0.25
    assert 'fastvit_host_work_ratio{host="node-1"}' not in found


def test_events_are_counted_while_the_port_is_open(exporter: Exporter, port: int, tmp_path: Path) -> None:
    for _ in range(2):
        record_event(RunFolder(tmp_path), "rewind", "back")
    assert figures(port)['fastvit_events_total{event="rewind"}'] == 2


def test_a_port_that_is_taken_and_an_address_of_another_machine_are_refused(exporter: Exporter, port: int) -> None:
    with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 cannot be used for Prometheus .*in use"):
        served(exporter, "127.0.0.1", port).__enter__()
    with pytest.raises(UserError, match="port 9400 of 192.0.2.1 cannot be used"):
        served(exporter, "192.0.2.1", 9400).__enter__()


def test_the_port_is_free_again_when_the_run_ends(exporter: Exporter) -> None:
    port = free_port()
    for _ in range(2):
        with served(exporter, "127.0.0.1", port):
            assert "fastvit_run_info" in get(port, "/")


def test_a_missing_package_is_refused_only_if_there_is_to_be_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_installed(None)
    with pytest.raises(UserError, match=r"pip install 'fastvit-engine\[prometheus\]'"):
        check_installed(9400)


def queries() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_the_dashboard_shows_every_figure_that_changes_and_no_other(exporter: Exporter, port: int) -> None:
    fill(exporter)
    exporter.count({"event": "rewind", "time": "", "message": "", "host": ""})
    served_names = {name.partition("{")[0] for name in figures(port)}
    asked = set(re.findall(r"fastvit_\w+", DASHBOARD.read_text()))
    assert asked <= served_names
    unasked = {"epoch", "samples", "training_seconds", "eval_step", "host_step"}
    assert served_names - asked == {f"fastvit_{name}" for name in unasked}


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Callable[[int], Callable[[str], list[Any]]]]:
    """Starts the real one, which scrapes a port once a second; returns how to ask it."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no Prometheus")
    started: list[subprocess.Popen[bytes]] = []

    def start(target: int) -> Callable[[str], list[Any]]:
        own = free_port()
        config = tmp_path / "prometheus.yml"
        config.write_text(
            "global: {scrape_interval: 1s}\nscrape_configs: [{job_name: fastvit, static_configs: "
            f"[{{targets: ['127.0.0.1:{target}']}}]}}]\n"
        )
        options = [f"--config.file={config}", f"--storage.tsdb.path={tmp_path}/tsdb"]
        command = [program, *options, f"--web.listen-address=127.0.0.1:{own}"]
        started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

        def ask(query: str) -> list[Any]:
            answer = json.loads(get(own, f"/api/v1/query?query={urllib.parse.quote(query)}"))
            assert answer["status"] == "success", answer
            return list(answer["data"]["result"])

        return ask

    yield start
    for process in started:
        process.kill()
        process.wait()


def eventually(ask: Callable[[str], list[Any]], query: str, seconds: float = 120) -> list[Any]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if found := ask(query):
                return found
        except OSError:  # it has not started yet
            pass
        time.sleep(0.5)
    pytest.fail(f"Prometheus never had {query}")


@only_in_full
@pytest.mark.distributed
def test_prometheus_itself_scrapes_a_run_and_takes_every_query_of_the_dashboard(
    prometheus: Any, train_command: Any, tmp_path: Path
) -> None:
    port = free_port()
    settings = ["train.duration=100000 steps", "schedule.warmup=0 steps", f"observe.prometheus_port={port}"]
    command = train_command(tmp_path / "run", *settings, processes=2)
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ask = prometheus(port)
        first = float(eventually(ask, "fastvit_step")[0]["value"][1])
        eventually(ask, f"fastvit_step > {first}")
        (work,) = eventually(ask, "fastvit_host_work_ratio")
        assert 0 < float(work["value"][1]) <= 1 and work["metric"]["host"] == socket.gethostname()
        for query in queries():
            for name, value in {"$instance": ".*", "$__rate_interval": "1m"}.items():
                query = query.replace(name, value)
            ask(query)
        left = eventually(ask, 'fastvit_step{instance=~".*"} / fastvit_total_steps{instance=~".*"}')
        assert 0 < float(left[0]["value"][1]) < 1
    finally:
        run.terminate()
        assert run.wait(120) == 76
    with pytest.raises(OSError):
        get(port, "/metrics")
