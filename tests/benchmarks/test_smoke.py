import time
from dataclasses import replace

import pytest
import torch

import fastvit_kernels
from benchmarks import smoke
from benchmarks.ops.layer_norm import torch_norm
from benchmarks.registry import Provider, functional
from benchmarks.smoke import Outcome, cases, explain, markdown, run_all


def test_every_operation_of_ours_is_tried_at_one_size():
    found = cases()
    assert {"attention", "layer_norm_mlp", "block", "patch_embed", "soft_cross_entropy"} <= set(found)
    assert "adamw" not in found  # PyTorch's
    assert len({(case.shape, case.batch) for case in found.values()}) == 1


def test_an_error_is_told_with_the_values_of_our_frames():
    with pytest.raises(Exception) as caught:
        fastvit_kernels.layer_norm(torch.ones(2, 3), torch.ones(4), torch.ones(4))
    text = explain(caught.value)
    assert "Traceback (most recent call last)" in text and "in layer_norm" in text
    assert "torch.float32 [2, 3], strides [3, 1], cpu" in text


@pytest.mark.distributed
def test_one_that_fails_hides_no_other():
    outcomes = {outcome.name: outcome for outcome in run_all(["layer_norm", "no such"], time.monotonic() + 200)}
    assert outcomes["layer_norm"].exit_code == 0 and "allowed" in outcomes["layer_norm"].said
    assert outcomes["no such"].exit_code == 1 and outcomes["no such"].said == "KeyError: 'no such'"
    text = markdown(list(outcomes.values()))
    assert "| no such | **exit code 1** |" in text and "Traceback" in text.partition("## no such")[2]
    (late,) = run_all(["layer_norm"], time.monotonic() - 1)
    assert late.exit_code is None


def test_a_wrong_result_is_an_error(monkeypatch, case, capsys):
    ours = Provider("fastvit", functional(lambda _: lambda x, weight, bias: 1.01 * torch_norm(x, weight, bias)))
    wrong = replace(case, op=replace(case.op, providers=(ours,)))
    monkeypatch.setattr(smoke, "cases", lambda: {"layer_norm": wrong})
    assert smoke.worker("layer_norm") == 1
    assert "ArithmeticError: wrong: " in capsys.readouterr().out.splitlines()[-1]


def test_the_last_line_is_what_it_said():
    assert Outcome("x", 0, 1.0, "first\nlast\n\n").said == "last"
    assert Outcome("x", None, 1.0, "").said == "nothing"
    assert Outcome("x", 0, 1.0, "skipped: no DeepSpeed").word == "skipped"


def test_without_its_packages_training_is_skipped(monkeypatch, capsys):
    monkeypatch.setattr(smoke, "TRAINING_NEEDS", ("torch", "no_such_package"))
    assert smoke.worker("train ZeRO-1") == 0
    assert capsys.readouterr().out == "skipped: not installed: no_such_package\n"
