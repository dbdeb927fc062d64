import re
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import fastvit_kernels
from benchmarks import smoke
from benchmarks.ops.layer_norm import torch_norm
from benchmarks.registry import Provider, functional
from benchmarks.smoke import checks, explain, names_of, run_all
from benchmarks.smoke_record import BUNDLED, Outcome, broken, kernel_verdicts, save, saved
from fastvit_kernels import dispatch


def test_every_operation_of_ours_is_tried_and_some_in_other_dtypes_and_under_autocast():
    found = checks()
    first = next(iter(found.values())).case
    large = {c.case.op.name for c in found.values() if (c.case.shape, c.case.batch) == (first.shape, first.batch)}
    assert {"attention", "layer_norm_mlp", "block", "patch_embed", "soft_cross_entropy"} <= large
    assert "adamw" not in large  # PyTorch's
    assert {c.case.op.name for c in found.values() if c.autocast} == {"layer_norm", "patch_embed", "block"}
    assert all(c.case.dtype == torch.float32 for c in found.values() if c.autocast)


def test_on_a_gpu_all_head_dimensions_and_lengths_that_matter_are_tried(monkeypatch):
    monkeypatch.setattr(smoke, "pick_device", lambda: torch.device("cuda"))
    attention = {c.name: c.case.shape for c in checks().values() if c.case.op.name == "attention"}
    sizes = {(shape.tokens, shape.head_dim) for shape in attention.values()}
    assert sizes == {(257, 80), (256, 80), (577, 80), (197, 64)}
    assert "attention/H/14/64/fp32" in attention and "attention/H/14/64/bf16" in attention
    assert "block/H/14/64/fp32 autocast" in checks() and "block/B/16/256/bf16" in checks()
    in_quack = {name for name in checks() if name.endswith("QuACK")}
    assert in_quack == {f"{op}/H/14/64/bf16 QuACK" for op in ("block", "layer_norm_mlp", "layer_norm_mlp_tanh")}


def test_quack_is_checked_if_it_is_there(monkeypatch, capsys):
    check = smoke.Check(next(c.case for c in checks().values() if c.case.op.name == "layer_norm_mlp"), quack=True)
    monkeypatch.setattr(smoke, "checks", lambda: {"mlp": check})
    asked = []
    monkeypatch.setattr(smoke, "check_operation", lambda *_: asked.append(dispatch.asked_for("gemm")))
    for reason, said in (("it is broken", "skipped: it is broken\n"), (None, "")):
        monkeypatch.setattr(smoke.libraries, "quack_obstacle", lambda arch, reason=reason: reason)
        assert smoke.worker("mlp", 1) == 0 and capsys.readouterr().out == said
    assert asked == ["quack"]


def test_an_error_is_told_with_the_values_of_our_frames():
    with pytest.raises(Exception) as caught:
        fastvit_kernels.layer_norm(torch.ones(2, 3), torch.ones(4), torch.ones(4))
    text = explain(caught.value)
    assert "Traceback (most recent call last)" in text and "in layer_norm" in text
    assert "torch.float32 [2, 3], strides [3, 1], cpu" in text


@pytest.mark.distributed
def test_one_that_fails_hides_no_other(tmp_path):
    (norm,) = names_of(["layer_norm/Ti/16@64/8/fp32 autocast"], training=False)
    found = {outcome.name: outcome for outcome in run_all([norm, "no such"], time.monotonic() + 200, repetitions=2)}
    assert found[norm].exit_code == 0 and "2 repetitions the same to the bit" in found[norm].said
    assert found["no such"].exit_code == 1 and found["no such"].said == "KeyError: 'no such'"
    save(tmp_path, BUNDLED, list(found.values()))
    text = (tmp_path / "smoke.md").read_text()
    assert "| no such | **exit code 1** |" in text and "Traceback" in text.partition("## no such")[2]
    (late,) = run_all([norm], time.monotonic() - 1)
    assert late.exit_code is None


def check_of(monkeypatch, case, function):
    ours = Provider("fastvit", functional(lambda _: function))
    chosen = smoke.Check(replace(case, op=replace(case.op, providers=(ours,))))
    monkeypatch.setattr(smoke, "checks", lambda: {"layer_norm": chosen})
    monkeypatch.setattr(smoke, "launches", lambda: nullcontext({"b_kernel", "a_kernel"}))


def test_a_wrong_result_is_an_error(monkeypatch, case, capsys):
    check_of(monkeypatch, case, lambda x, weight, bias: 1.01 * torch_norm(x, weight, bias))
    assert smoke.worker("layer_norm") == 1
    lines = capsys.readouterr().out.splitlines()
    assert "kernels: a_kernel, b_kernel" in lines and "ArithmeticError: wrong: " in lines[-1]


def test_a_result_with_other_bits_in_a_repetition_is_an_error(monkeypatch, case, capsys):
    calls = iter(range(100))

    def unstable(x, weight, bias):
        y = torch_norm(x, weight, bias)
        return y if next(calls) < 3 else torch.nextafter(y, y + 1)  # right, but not the same

    check_of(monkeypatch, case, unstable)
    assert smoke.worker("layer_norm", 5) == 1
    said = capsys.readouterr().out.splitlines()[-1]
    assert re.match(
        r"ArithmeticError: not deterministic: \d+ numbers of the output 0 differ .* repetition 2 of 5", said
    )


def test_assemblers_are_compared_by_check_and_by_kernel(tmp_path):
    log = "kernels: attention_fwd_kernel, sum_kernel\n"
    save(tmp_path, BUNDLED, [Outcome("attention", 1, 2.0, log + "ArithmeticError: wrong: x"),
                             Outcome("mlp", 0, 1.0, "kernels: sum_kernel, gelu_kernel\nfine")])  # fmt: skip
    save(tmp_path, "ptxas 13.3", [Outcome("attention", 0, 2.0, log + "fine"), Outcome("train ZeRO-1", 1, 1.0, "no")])
    by_assembler = saved(tmp_path)
    assert broken(by_assembler, BUNDLED) == {"attention"} and broken(by_assembler, "ptxas 13.3") == set()
    verdicts = kernel_verdicts(by_assembler)
    assert verdicts["gelu_kernel"] == {BUNDLED: "ok"}
    assert verdicts["attention_fwd_kernel"] == {BUNDLED: "**in question**: attention", "ptxas 13.3": "ok"}
    text = (tmp_path / "smoke.md").read_text()
    assert "| attention | **exit code 1** | ok | 2 | ArithmeticError: wrong: x |" in text
    assert "| attention_fwd_kernel | **in question**: attention | ok |" in text


def test_the_last_line_is_what_it_said():
    assert Outcome("x", 0, 1.0, "first\nlast\n\n").said == "last"
    assert Outcome("x", None, 1.0, "").said == "nothing"
    assert Outcome("x", 0, 1.0, "skipped: no DeepSpeed").word == "skipped"


def test_without_its_packages_training_is_skipped(monkeypatch, capsys):
    monkeypatch.setattr(smoke, "TRAINING_NEEDS", ("torch", "no_such_package"))
    assert smoke.worker("train ZeRO-1") == 0
    assert capsys.readouterr().out == "skipped: not installed: no_such_package\n"
