"""The record of incidents: whole lines, whoever writes and however it ends."""

from concurrent.futures import ProcessPoolExecutor

import pytest

from fastvit_engine.observe.events import read_events, record_event
from fastvit_engine.observe.run_folder import RunFolder


def _write(run, writer):
    for number in range(20):
        record_event(run, "slow_rank", "x" * 2000, writer=writer, number=number)


def test_lines_of_several_processes_never_mix(tmp_path):
    run = RunFolder(tmp_path / "run")
    with ProcessPoolExecutor(3) as pool:
        list(pool.map(_write, [run] * 3, range(3)))
    written = [(event["writer"], event["number"]) for event in read_events(run)]
    assert sorted(written) == [(writer, number) for writer in range(3) for number in range(20)]


def test_an_event_has_time_host_rank_and_facts(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    record_event(run, "rewind", "back to step 10", step=17, to_step=10)
    monkeypatch.setenv("RANK", "3")
    record_event(run, "failure", "rank 3 is out of memory")
    first, second = read_events(run)
    assert (first["event"], first["step"], first["to_step"]) == ("rewind", 17, 10)
    assert "rank" not in first and second["rank"] == 3
    assert first["host"] and "T" in first["time"]


def test_half_a_line_of_a_killed_writer_is_left_out_and_no_line_joins_it(tmp_path, capsys):
    run = RunFolder(tmp_path)
    assert read_events(run) == []
    record_event(run, "start", "2 processes")
    whole = run.events.read_text()
    run.events.write_text(whole + '{"time": "20')
    assert len(read_events(run)) == 1
    record_event(run, "restart", "after the kill")
    assert [event["event"] for event in read_events(run)] == ["start", "restart"]
    assert capsys.readouterr().err.count("events.jsonl ended in half a line") == 1


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"time": 1}', "is not an event"),
        ('{"time": "2026", "event": "start", "message": 3}', "is not an event"),
        ('{"time": "2026", "event": "start", "message": "", "step": "3"}', "is not an event"),
        ('{"time": "2026", "event": "start", "message": "", "rank": 1e9}', "is not an event"),
        ('{"time": "2026", "event": "start", "message": "", "world_size": ' + "9" * 99 + "}", "is not an event"),
        ("\0" * 40, "is not JSON"),
        ("[1]", "is not a JSON object"),
        ("{oops", "is not JSON"),
    ],
)
def test_damaged_lines_are_left_out_and_counted(tmp_path, line, problem, capsys):
    run = RunFolder(tmp_path)
    record_event(run, "start", "2 processes")
    run.events.write_text(run.events.read_text() + line + "\n" + run.events.read_text())
    assert [event["event"] for event in read_events(run)] == ["start", "start"]
    assert capsys.readouterr().err == f"fastvit: {run.events} line 2 {problem}: left out\n"


def test_unknown_kinds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown event 'stopp'"):
        record_event(RunFolder(tmp_path), "stopp", "")
    assert not (tmp_path / "events.jsonl").exists()
