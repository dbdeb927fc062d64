"""What is missing to compile code: a compiler, Python's headers, nvcc, and operations of DeepSpeed."""

import os
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fastvit_engine.doctor import compilers
from fastvit_engine.doctor.findings import Status


@pytest.fixture
def deepspeed(monkeypatch):
    """deepspeed(name=bool, ...): a DeepSpeed whose operations can be compiled or not. None: asking raises."""

    def install(**operations):
        def builder(answer):
            def is_compatible(verbose):
                if answer is None:
                    raise FileNotFoundError("nvcc")
                return answer

            return SimpleNamespace(is_compatible=is_compatible)

        for name in ("deepspeed", "deepspeed.ops", "deepspeed.ops.op_builder", "deepspeed.ops.op_builder.all_ops"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["deepspeed"].__version__ = "0.19.8"
        sys.modules[name].ALL_OPS = {key: builder(answer) for key, answer in operations.items()}

    return install


def operations(**settings):
    return {one.subject: one for one in compilers._check_operations(settings)}


def test_operations_that_can_be_compiled_and_that_none_is_needed(deepspeed):
    deepspeed(cpu_adam=True, async_io=False, fused_adam=None, deepspeed_not_implemented=True)
    found = operations()
    assert found["DeepSpeed's operations"].found == (
        "can be compiled: cpu_adam; cannot: async_io, fused_adam; these settings need none of them (DeepSpeed 0.19.8)"
    )
    assert {one.status for one in found.values()} == {Status.OK}


def test_an_operation_that_the_settings_need_and_that_cannot_be_compiled(deepspeed):
    deepspeed(quantizer=False)
    finding = operations(zero_optimization={"zero_quantized_weights": True})["DeepSpeed's quantizer"]
    assert finding.status == Status.PROBLEM
    assert (
        finding.found == "deepspeed.zero_optimization.zero_quantized_weights needs it, and it cannot be compiled here"
    )


def test_ninja_matters_only_if_something_is_compiled(deepspeed, monkeypatch):
    deepspeed(quantizer=True)
    monkeypatch.setenv("PATH", "/nowhere")
    assert "ninja" not in operations()
    assert operations(zero_optimization={"zero_quantized_weights": True})["ninja"].status == Status.PROBLEM


@pytest.mark.parametrize(("on_gpu", "status"), [(True, Status.PROBLEM), (False, Status.NOTE)])
def test_no_c_compiler(monkeypatch, on_gpu, status):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    finding = compilers._check_compiler()
    assert (finding.status, finding.found.partition(":")[0].partition(";")[0]) == (status, "there is none")
    monkeypatch.setenv("CC", "icc")
    assert compilers._check_compiler().found.startswith("CC is 'icc', which is not there")


def test_no_headers_of_python(monkeypatch, tmp_path):
    monkeypatch.setattr(compilers.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    (tmp_path / "gcc").write_text("#!/bin/sh\n")
    (tmp_path / "gcc").chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "gcc"))
    assert f"and no {tmp_path}/Python.h" in compilers._check_compiler().found


@pytest.mark.parametrize(("release", "status"), [("13.1", Status.OK), ("12.8", Status.NOTE)])
def test_nvcc_must_be_of_the_cuda_of_torch(monkeypatch, tmp_path, release, status):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.48'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (finding,) = compilers._check_nvcc()
    assert finding.status == status and f"{nvcc}" in finding.found and release in finding.found
    nvcc.unlink()
    (finding,) = compilers._check_nvcc()
    assert finding.found == f"there is none in CUDA_HOME={tmp_path}"


def test_the_lock_of_a_build_that_was_killed(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cu130" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert list(compilers._check_locks()) == [], "a build may be running"
    os.utime(lock, (time.time() - 3600,) * 2)
    (finding,) = compilers._check_locks()
    assert finding.status == Status.WARNING and f"rm '{lock}'" in finding.advice
