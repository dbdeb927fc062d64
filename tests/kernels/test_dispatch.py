import os
import subprocess
import sys

import pytest
import torch

import fastvit_kernels
from fastvit_kernels import dispatch


def test_auto_is_triton_on_a_gpu_and_the_reference_on_the_cpu(device: torch.device) -> None:
    with dispatch.using("auto"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert dispatch.uses_triton(torch.empty(2, dtype=dtype, device=device)) == (device.type == "cuda")
        assert not dispatch.uses_triton(torch.empty(2, dtype=torch.float64, device=device))


def test_reference_is_always_available(device: torch.device) -> None:
    with dispatch.using("reference"):
        assert not dispatch.uses_triton(torch.empty(2, device=device))


def test_triton_runs_on_the_cpu_only_by_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    with dispatch.using("triton"):
        monkeypatch.setattr(dispatch, "INTERPRETED", True)
        assert dispatch.uses_triton(torch.empty(2))
        monkeypatch.setattr(dispatch, "INTERPRETED", False)
        with pytest.raises(RuntimeError, match="FASTVIT_KERNELS=triton was asked for, but Triton runs on a GPU"):
            dispatch.uses_triton(torch.empty(2))
        monkeypatch.setattr(dispatch, "HAS_TRITON", False)
        with pytest.raises(RuntimeError, match="triton is not installed"):
            dispatch.uses_triton(torch.empty(2))


def test_using_restores_the_choice_after_an_error() -> None:
    before = dispatch.choice
    with pytest.raises(KeyError), dispatch.using("reference"):
        raise KeyError
    assert dispatch.choice == before
    with pytest.raises(ValueError, match="implementation must be one of auto, triton, reference, got 'cuda'"):
        dispatch.using("cuda").__enter__()


def test_explain_names_every_operation_and_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(operation: str) -> list[str]:
        lines = fastvit_kernels.explain().splitlines()
        return next(line for line in lines if line.startswith(operation)).split(maxsplit=1)[1].split("  ")

    for operation in ("attention", "cross_entropy", "layer_norm", "mlp", "patch_embed"):
        assert row(operation)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    for choice, gpu, cpu in [
        ("auto", "triton", "reference"),
        ("triton", "triton", "error (Triton needs a GPU)"),
        ("reference", "reference (asked for)", "reference (asked for)"),
    ]:
        with dispatch.using(choice):
            assert (row("layer_norm")[0], row("layer_norm")[-1].strip()) == (gpu, cpu)
            assert f"FASTVIT_KERNELS={choice}" in fastvit_kernels.explain()


@pytest.mark.parametrize(
    ("value", "code", "said"),
    [
        ("reference", 0, "reference"),
        ("", 0, "auto"),
        ("cuda", 1, "ValueError: FASTVIT_KERNELS must be one of auto, triton, reference"),
    ],
)
def test_environment_variable_chooses_and_is_checked(value: str, code: int, said: str) -> None:
    program = "import fastvit_kernels.dispatch as dispatch; print(dispatch.choice)"
    environment = os.environ | {"FASTVIT_KERNELS": value}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == code
    assert said in (result.stdout + result.stderr).splitlines()[-1]


@pytest.mark.parametrize("module", ["fastvit_kernels.tuning", "fastvit_kernels.tuning.codegen"])
def test_commands_say_in_one_sentence_that_the_variable_is_wrong(module: str) -> None:
    environment = os.environ | {"FASTVIT_KERNELS": "cuda"}
    command = [sys.executable, "-m", module, "--help"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == ("fastvit_kernels: FASTVIT_KERNELS must be one of auto, triton, reference, got 'cuda'\n")
