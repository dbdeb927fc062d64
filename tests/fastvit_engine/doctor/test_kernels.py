"""Who runs each operation, by which table, and with which assembler; on a GPU that is faked."""

import pytest
import torch

from fastvit_engine.doctor import kernels
from fastvit_engine.doctor.findings import Status
from fastvit_kernels import dispatch, table, toolchain


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(dispatch, "_properties", lambda device: dispatch.Gpu("sm_90", 132, "H200"))


def check(precision="bf16"):
    return {one.subject: one for one in kernels.check_kernels(precision)}


def test_on_a_cpu_the_reference_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with dispatch.using("auto"):
        found = check()
    assert found["operations"].found.startswith("in bf16 on the CPU, reference (on the CPU): attention, ")
    assert "ptxas for sm_90" not in found


def test_on_a_gpu_triton_runs_and_the_assembler_is_named(gpu, monkeypatch):
    with dispatch.using("auto"):
        assert check()["operations"].found.startswith("in bf16 on a GPU, triton: attention, ")
        fp32 = check("fp32")["operations"].found
    assert "reference (fp32 products): attention" in fp32 and "triton: cross_entropy, fp8, layer_norm" in fp32
    assert check()["ptxas for sm_90"].same


def test_a_ptxas_with_reported_faults_is_a_warning(gpu, monkeypatch):
    monkeypatch.setattr(toolchain, "assembler", lambda arch: toolchain.Assembler("/ptxas", (12, 9, 86), "shipped"))
    finding = check()["ptxas for sm_90"]
    assert finding.status == Status.WARNING
    assert finding.found.startswith("12.9.86 (shipped); reported with it: wrong numbers and invalid shared writes")
    monkeypatch.setattr(toolchain, "assembler", lambda arch: toolchain.Assembler("/ptxas", (13, 1, 80), "shipped"))
    monkeypatch.setattr(toolchain, "FAULTS", toolchain.FAULTS[:1])
    assert check()["ptxas for sm_90"].status == Status.OK


def test_the_table_says_who_runs_what(gpu):
    made = table.Provenance("H200", True, table.NOTES[True], "2026-01-01", "3.7.1", "2.13.0", table.TOOL)
    where = [{"head_dim": 80, "dtype": "bfloat16", "tokens": tokens} for tokens in (257, 1025)]
    use = [{"provider": "cudnn"}, {"provider": "triton"}]
    entries = [table.Entry("attention_fwd", *case, 2.0, 1.0, 0.01, "source") for case in zip(where, use, strict=True)]
    with table.using(table.Table(made, tuple(entries))):
        finding = check()["tuning table"]
    assert finding.status == Status.OK
    assert finding.found.endswith("; of 2 sizes that it names, cudnn runs 1, triton runs 1")


def test_a_table_that_was_not_measured_is_a_note(gpu, monkeypatch):
    made = table.Provenance("H200", False, table.NOTES[False], "2026-01-01", "3.7.1", "2.13.0", table.TOOL)
    with table.using(table.Table(made)):
        finding = check()["tuning table"]
    assert (finding.status, "not measured" in finding.found) == (Status.NOTE, True)


def test_what_is_asked_for_and_cannot_run_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with dispatch.using("attention=cudnn"):
        finding = check()["operations"]
    assert finding.status == Status.PROBLEM
    assert "error (needs bf16 or fp16 on a GPU): attention" in finding.found


def test_a_folder_of_compiled_code_that_others_may_write(monkeypatch, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "shared"))
    finding = check()["compiled code"]
    assert finding.status == Status.PROBLEM
    assert f"other users may write to {tmp_path}/shared (TRITON_CACHE_DIR)" in finding.found
    assert finding.advice.startswith("run chmod go-w")
