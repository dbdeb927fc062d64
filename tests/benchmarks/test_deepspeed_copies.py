"""What DeepSpeed moves per parameter, counted in a step, is what its code says."""

import pytest

from benchmarks.deepspeed_copies import NETWORK, Case, Operator, measure, milliseconds, table
from tests.fastvit_engine.conftest import lone_world

__all__ = ["lone_world"]  # a fixture


def moved(row):
    return {kind: round(way["read"] + way["written"], 1) for kind, way in row["kinds"].items()}


def test_a_step_of_zero_1_in_bf16(lone_world):
    """The gradient of each parameter is cast and added up (2 + 4, 4 + 4 + 4), read for the norm, scaled, zeroed."""
    alone, usual = (measure(Case(1, "bf16", reduces=reduces), lone_world) for reduces in (False, True))
    assert moved(alone) == {
        "accumulation": 18.0, "reduction": 0.0, NETWORK: 0.0, "norm": 4.0, "clipping": 8.0, "zeros": 8.0, "copies": 6.0,
    }  # fmt: skip
    # flattened (8), rounded to bf16 and back (6 + 6), copied back (8); all-reduced in bf16
    assert moved(usual) == moved(alone) | {"reduction": 28.0, NETWORK: 4.0}
    assert alone["bytes"] == pytest.approx(44, abs=0.1) and usual["bytes"] == pytest.approx(72, abs=0.1)
    assert alone["kinds"]["accumulation"]["operators"] == pytest.approx(2, abs=0.1)  # per tensor
    assert milliseconds(44) == pytest.approx(44 * 632_045_800 / (0.85 * 4.3e12) * 1e3)
    assert "72.0" in table([alone, usual]).splitlines()[2]


def test_a_norm_below_the_limit_scales_nothing(lone_world):
    assert moved(measure(Case(1, "bf16", clips=False), lone_world))["clipping"] == 0


def test_an_operator_that_no_step_issued_before_is_refused():
    with pytest.raises(ValueError, match="cumsum is of no known kind"):
        _ = Operator("step", "cumsum", 40, 40).kind
