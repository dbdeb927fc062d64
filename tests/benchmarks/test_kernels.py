import json
from dataclasses import replace

import pytest
import torch

from benchmarks import kernels
from benchmarks.kernels import Effort, Selection, fill_in_times, measure_case
from benchmarks.ops.layer_norm import torch_norm
from benchmarks.registry import Provider, Unusable, functional
from benchmarks.report import kernels_markdown
from benchmarks.timing import Clock, Times

CEILINGS = {"copy_bytes_per_second": 1e9, "matmul_side": 64, "matmul_flops": {"float32": 1e9}}


def provider(name, function, **options):
    return Provider(name, functional(lambda _: function), **options)


def off(x, weight, bias):
    return 1.01 * torch_norm(x, weight, bias)


def unusable(case):
    raise Unusable("needs a licence")


def measured(case, *providers):
    case = replace(case, op=replace(case.op, providers=providers))
    row = measure_case(case, Clock(torch.device("cpu")), CEILINGS, effort=Effort(rounds=3, seconds=1))
    return row, {provider["provider"]: provider for provider in row["providers"]}


def report(environment, *rows):
    record = {"suite": "kernels", "quick": False, "environment": environment, "cases": list(rows)}
    return kernels_markdown(record | {"unmeasured": ["later"], "ceilings": [CEILINGS]})


def broken(x, weight, bias):
    raise RuntimeError("boom\nand more")


def test_a_case_with_everything_that_can_happen(case, environment):
    row, rows = measured(
        case,
        provider("fastvit", torch_norm),
        provider("eager", torch_norm),
        provider("quick but wrong", off),
        provider("broken", broken),
        Provider("absent", unusable),
        provider("coarse", off, precision=0.1),
    )
    assert {name: row["status"] for name, row in rows.items()} == {
        "fastvit": "ok", "eager": "ok", "quick but wrong": "wrong", "broken": "failed", "absent": "skipped",
        "coarse": "ok",
    }  # fmt: skip
    assert "passes" not in rows["quick but wrong"] and "passes" not in rows["broken"]
    assert rows["broken"]["reason"] == "RuntimeError: boom"
    assert row["best_peer"] == {"forward": "eager", "backward": "eager", "both": "eager"}  # never a coarser format
    assert rows["fastvit"]["passes"]["both"]["as"] == "eager"
    assert "times_as_fast" not in rows["eager"]["passes"]["both"]
    assert rows["eager"]["passes"]["both"]["fastvit_times_as_fast"][1] > 0
    assert "aten::native_layer_norm" in rows["eager"]["backend"]
    text = report(environment, row)
    assert "| quick but wrong | **wrong** |" in text
    assert "times as fast as eager" in text
    assert "absent (skipped, needs a licence)" in text and "later: no time was left for it" in text


def test_no_speed_up_is_shown_where_ours_is_wrong(case, environment):
    row, rows = measured(case, provider("fastvit", off), provider("eager", torch_norm))
    assert rows["fastvit"]["status"] == "wrong"
    assert all("times_as_fast" not in of_pass for row in rows.values() for of_pass in row.get("passes", {}).values())
    text = report(environment, row)
    assert "times as fast as eager" not in text
    assert "| layer_norm (reference) | tiny/8@16, 2 | wrong | | | | | | |" in text


def test_ratios_are_taken_within_a_round(case):
    """A machine that is ten times as slow in one round changes no ratio."""
    rows = [{"provider": "fastvit"}, {"provider": "slow"}, {"provider": "fast"}]
    device = {"fastvit": [1.0, 10.0, 2.0], "slow": [3.0, 30.0, 6.0], "fast": [2.0, 20.0, 4.0]}
    times = {name: Times({"forward": v, "backward": v, "both": v}, {"forward": 0.0, "backward": 0.0})
             for name, v in device.items()}  # fmt: skip
    fill_in_times(case, rows, times, CEILINGS)
    forward = rows[0]["passes"]["forward"]
    assert forward["as"] == "fast" and forward["times_as_fast"] == [2.0, 2.0, 2.0]
    assert forward["ms"] == [1.5, 2.0, 6.0]
    moved = 2 * 2 * 5 * 32 * 4  # x read and y written: 2 images, 5 tokens, 32 wide, 4 bytes
    assert forward["per_second"] == pytest.approx(moved / 2e-3) and forward["scarce"] == "bytes"
    assert forward["share_of_ceiling"] == pytest.approx(moved / 1e9 / 2e-3)
    assert [row["passes"]["both"].get("fastvit_times_as_fast") for row in rows] == [None, [3.0] * 3, [2.0] * 3]


def test_a_measuring_process_that_dies_costs_one_provider(monkeypatch, capsys):
    """Twice it dies: at a provider of the first case, which is then left out, and at the race of the second."""
    names = [case.id for case in kernels.select(Selection(quick=True, ops=("layer_norm",)), torch.device("cpu"))]
    monkeypatch.setattr(kernels, "pick_device", lambda: torch.device("cpu"))
    scripts = [
        (139, [{"ceilings": CEILINGS}, {"begin": [names[0], "inputs"]}, {"begin": [names[0], "liger"]}]),
        (-9, [{"case": {"case": names[0]}}, {"begin": [names[1], "race"]}]),
        (0, [{"ceilings": CEILINGS}]),
    ]
    orders = []

    def worker(selection, progress, deadline, folder, record):
        code, lines = scripts[len(orders)]
        orders.append((set(progress.done), set(progress.fatal)))
        journal = folder / "journal"
        with journal.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.write('{"begin": ["half')  # it died while it wrote
        record.take_in(journal)
        journal.write_text(journal.read_text().removesuffix('{"begin": ["half'))
        return code, "log"

    monkeypatch.setattr(kernels, "run_worker", worker)
    record = kernels.measure(Selection(quick=True, ops=("layer_norm",)), print)
    assert orders == [
        (set(), set()),
        (set(), {(names[0], "liger")}),
        (set(names), {(names[0], "liger"), (names[1], "race")}),
    ]
    assert record["cases"] == [
        {"case": names[0]},
        {"case": names[1], "failed": "ended the process that measured it (race)"},
    ]
    assert record["error"] is None


def test_a_measuring_process_that_cannot_start_is_an_error_not_a_loop(monkeypatch):
    monkeypatch.setattr(kernels, "pick_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(kernels, "run_worker", lambda *arguments: (1, "no torch"))
    assert "exit code 1: no torch" in kernels.measure(Selection(quick=True, ops=("layer_norm",)), print)["error"]
