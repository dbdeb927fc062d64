"""GPUs that are faked where driver and PyTorch are asked: a script named nvidia-smi, and functions of torch.cuda."""

import os
from types import SimpleNamespace

import pytest
import torch

from fastvit_engine.doctor import gpus, nvidia
from fastvit_engine.doctor.findings import Status

GIB = 2**30
TOPOLOGY = """
        GPU0    GPU1    GPU2    NIC0    CPU Affinity    NUMA Affinity
GPU0     X      NV18    {other} PXB     0-47            0
GPU1    NV18     X      {other} PXB     0-47            0
GPU2    {other} {other}  X      SYS     48-95           1
NIC0    PXB     PXB     SYS      X

Legend:
  NV#  = Connection traversing a bonded set of # NVLinks
"""


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """driver(modes=[...], processes="...", topology="...", cuda="13.0", code=0): puts an nvidia-smi on the PATH."""

    def install(count=3, *, mode="Default", processes="", other="NV18", cuda="13.0", fails=""):
        gpu = "\\n".join(f"{n}, NVIDIA H200, GPU-{n}, 143771, 143000, {mode}, 580.65.06" for n in range(count))
        script = tmp_path / "nvidia-smi"
        script.write_text(
            "#!/bin/sh\n" + (f"echo '{fails}'; exit 9\n" if fails else "") + 'case "$*" in\n'
            f'*--query-gpu*) printf "{gpu}\\n" ;;\n'
            f'*--query-compute-apps*) printf "{processes}\\n" ;;\n'
            f"topo*) cat <<'EOF'\n{TOPOLOGY.format(other=other)}EOF\n;;\n"
            f'*) echo "| NVIDIA-SMI 580.65.06   Driver Version: 580.65.06   CUDA Version: {cuda} |" ;;\n'
            "esac\n"
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return install


@pytest.fixture
def cuda(monkeypatch):
    """cuda(count, ...): PyTorch shows so many GPUs."""

    def install(count=3, *, free=lambda device: 142 * GIB, name=lambda device: "NVIDIA H200", rate=None, peers=None):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda n: SimpleNamespace(name=name(n), total_memory=143 * GIB)
        )
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda n: (free(n), 143 * GIB))
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", peers or (lambda a, b: True))
        monkeypatch.setattr(gpus, "rate_to_device", rate or (lambda device: 50e9))
        monkeypatch.setattr(gpus, "rate_between", lambda a, b: 300e9)

    return install


def findings():
    return {one.subject: one for one in gpus.check_gpus()}


def test_gpus_that_are_well(driver, cuda):
    driver()
    cuda()
    found = findings()
    assert {one.status for one in found.values()} == {Status.OK}
    assert found["GPUs"].found == "3 x NVIDIA H200, 143.0 GiB"
    assert found["driver"].found == "580.65.06, for CUDA up to 13.0"
    assert found["links between GPUs"].found == "NVLink"
    assert found["GPU to GPU"].found.startswith("279.4 GiB/s at least")


def test_a_machine_without_gpus_says_so(monkeypatch):
    monkeypatch.setattr(gpus, "ask_driver", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (finding,) = gpus.check_gpus()
    assert (finding.status, finding.found) == (Status.NOTE, "there is none here: training runs on the CPU")


def test_a_torch_without_cuda_beside_gpus_is_a_problem(driver, monkeypatch):
    driver()
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    finding = findings()["GPUs"]
    assert finding.status == Status.PROBLEM
    assert finding.found.startswith("the driver shows 3 GPUs and PyTorch sees none: torch ")
    assert finding.found.endswith(" was built without CUDA")


def test_gpus_that_a_variable_hides(driver, cuda, monkeypatch):
    driver()
    cuda(0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES is ''" in findings()["GPUs"].found


def test_a_driver_that_is_too_old(driver, cuda):
    driver(cuda="12.8")
    cuda()
    finding = findings()["driver"]
    assert finding.status == Status.PROBLEM
    assert "for CUDA up to 12.8; torch " in finding.found and "was built for CUDA 13.0, which is newer" in finding.found


def test_a_driver_that_does_not_answer(driver, monkeypatch, tmp_path):
    driver(fails="Failed to initialize NVML: Driver/library version mismatch")
    (finding,) = gpus.check_gpus()
    assert finding.status == Status.PROBLEM
    assert finding.found == "nvidia-smi fails: Failed to initialize NVML: Driver/library version mismatch"
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(nvidia, "_SECONDS", 0.2)
    (finding,) = gpus.check_gpus()
    assert finding.found.startswith("nvidia-smi does not answer within")


def test_other_processes_and_modes_are_named(driver, cuda):
    driver(mode="Prohibited", processes="4711, GPU-1, 40000, /opt/jupyter/bin/python3")
    cuda(free=lambda device: (100 if device == 1 else 142) * GIB)
    found = findings()
    assert found["other processes"].status == Status.WARNING
    assert "process 4711 (python3) has 39.1 GiB of GPU 1" in found["other processes"].found
    assert found["free memory"].found == "GPU 1 has 100.0 GiB of 143.0 GiB free"
    assert found["compute mode"].status == Status.PROBLEM


def test_gpus_of_two_kinds(driver, cuda):
    driver()
    cuda(name=lambda device: "NVIDIA A100" if device == 2 else "NVIDIA H200")
    assert "of several kinds: 2 x NVIDIA H200, 143.0 GiB; 1 x NVIDIA A100, 143.0 GiB" in findings()["GPUs"].found


@pytest.mark.parametrize("other", ["SYS ", "NODE"])
def test_pairs_without_nvlink(driver, cuda, other):
    driver(other=other)
    cuda()
    finding = findings()["links between GPUs"]
    assert finding.status == Status.WARNING
    assert finding.found == f"some pairs have NVLink and others do not: NVLink and PCIe ({other.strip()})"


def test_pairs_that_cannot_reach_each_other(driver, cuda):
    driver(other="PHB ")
    cuda(peers=lambda a, b: 2 not in (a, b))
    assert (
        "GPUs 0 and 2 cannot read each other's memory, nor can 3 other pairs" in findings()["links between GPUs"].found
    )


def test_a_gpu_that_copies_slower_than_the_others_is_named(driver, cuda):
    driver()
    cuda(rate=lambda device: 6e9 if device == 1 else 50e9)
    finding = findings()["host to GPU"]
    assert finding.status == Status.WARNING
    assert finding.found == "slower than the others, whose median is 46.6 GiB/s: GPU 1 5.6 GiB/s"
