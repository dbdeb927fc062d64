import pytest

from benchmarks.plan_accuracy import ALONE, CASES, Case, predict, render, rows_of


def results(alone=0.2, latency=1e-3, measured=1.0):
    """As after two rounds in which everything took as long."""
    return {
        "environment": {
            "command": "python -m benchmarks.plan_accuracy",
            "started": "now",
            "cpu": "a CPU",
            "cpu_count": 2,
            "load_average": [0.5],
            "versions": {"torch": "2", "deepspeed": "0"},
        },
        "parameters": 1,
        "rounds": 2,
        "links": {case.key: [[latency, 1e6 * case.cable.megabytes_per_second]] * 2 for case in CASES},
        "seconds": {case.key: [alone] * 2 for case in ALONE} | {case.key: [measured] * 2 for case in CASES},
        "sent": {case.key: [1e6] * 2 for case in CASES},
    }


def test_every_combination_has_its_time_alone_and_a_key_of_its_own():
    assert len(CASES) == 12 and len({case.key for case in [*CASES, *ALONE]}) == len(CASES) + len(ALONE)
    assert {Case(case.stage, case.processes, None) for case in CASES} <= set(ALONE)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_a_prediction_is_what_is_computed_and_what_is_sent(case):
    predicted = predict(case, results())
    assert predicted.computing == pytest.approx(0.2)
    least = predicted.sent_bytes / (1e6 * case.cable.megabytes_per_second)
    assert predicted.communicating >= least * (1 - 1e-9)
    assert predict(case, results(latency=0.1)).total > predicted.total
    assert predict(case, results(alone=0.3)).total == pytest.approx(predicted.total + 0.1, abs=0.1)


def test_the_table_says_how_many_predictions_are_near():
    right = results()
    for case in CASES:
        right["seconds"][case.key] = [predict(case, right).total * 1.1] * 2
    assert "12 of 12 predictions are within 15 %; the worst is -9 %." in render(right)
    right["seconds"][CASES[0].key] = [10.0, 10.0]
    assert "11 of 12 predictions are within 15 %" in render(right)
    assert [row["measured"] for row in rows_of(right)][0] == 10.0
