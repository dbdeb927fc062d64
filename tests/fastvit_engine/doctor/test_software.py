"""Versions that do not fit together, packages that are missing, and the wrong apex; each in a faked environment."""

import importlib
import importlib.metadata
import sys
import time
from types import SimpleNamespace

import pytest

from fastvit_engine.doctor import software
from fastvit_engine.doctor.findings import Status


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of packages that come first; `site(name, version, *requirements)` installs one."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(name, version, *requirements):
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        lines = [
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}",
            *map("Requires-Dist: {}".format, requirements),
        ]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")

    install.folder = tmp_path
    return install


check_torchvision = software._check_torchvision


@pytest.fixture(autouse=True)
def without_torchvision(monkeypatch):
    """The one of this environment may be of another build than its torch, and this process must not import it then."""
    monkeypatch.setattr(software, "_check_torchvision", lambda: iter(()))


def found(subject):
    return {one.subject: one for one in software.check_software()}[subject]


def test_this_environment_is_well():
    assert [one for one in software.check_software() if one.status in (Status.PROBLEM, Status.WARNING)] == []
    assert found("torch").same == importlib.metadata.version("torch")


@pytest.mark.parametrize(
    ("installed", "status"),
    [("3.7.1", Status.OK), ("3.7.1+git1234", Status.OK), ("3.6.0", Status.PROBLEM)],
)
def test_triton_must_be_the_one_that_torch_was_built_with(site, installed, status):
    site("torch", "2.13.0+cu130", "triton==3.7.1; platform_system == 'Linux'", "numpy; extra == 'other'")
    site("triton", installed)
    finding = found("torch and triton")
    assert finding.status == status
    if status == Status.PROBLEM:
        assert "torch 2.13.0+cu130 was built with triton==3.7.1, and triton 3.6.0 is installed" in finding.found
        assert finding.advice == "pip install 'triton==3.7.1'"


def test_cuda_libraries_must_be_those_of_torch(site):
    site("torch", "2.13.0", "nvidia-nccl-cu13==2.29.1", "nvidia-cudnn-cu13==9.1", "cuda-toolkit[nvrtc]==13.0.1")
    site("nvidia-nccl-cu13", "2.28.9")
    site("nvidia-cudnn-cu13", "9.1")
    finding = found("CUDA libraries")
    assert finding.status == Status.WARNING
    assert "nvidia-nccl-cu13 is 2.28.9, not ==2.29.1; cuda-toolkit is not installed, not ==13.0.1" in finding.found


def test_packages_that_the_engine_needs_are_named_with_the_version(site, monkeypatch):
    requirements = ["deepspeed>=0.19.8; extra == 'train'", "pillow; extra == 'train'", "ray; extra == 'ray'"]
    site("fastvit-engine", "0.1.0", *requirements)
    site("deepspeed", "0.18.0")
    version = software._version
    monkeypatch.setattr(software, "_version", lambda name: None if name == "pillow" else version(name))
    assert found("deepspeed").found == "deepspeed 0.18.0 is installed, and the engine needs >=0.19.8"
    assert found("deepspeed").advice == "pip install 'deepspeed>=0.19.8'"
    assert found("pillow").found == "pillow is not installed, and training needs it"
    assert found("pillow").status == Status.PROBLEM


def test_a_prerelease_of_a_vendor_counts_as_its_release(site):
    site("fastvit-kernels", "0.1.0", "torch>=2.11")
    site("torch", "2.11.0a0+nv25.11")
    assert found("torch").status == Status.OK


@pytest.mark.parametrize(
    ("waited", "status", "words"),
    [
        (0, Status.WARNING, "imported in 31.0 s"),
        (24, Status.OK, "imported in 31.0 s, 24.0 of which it waited for a core"),
    ],
)
def test_a_slow_import_is_the_disks_unless_the_machine_had_no_core_for_it(monkeypatch, waited, status, words):
    times, waits = iter([100, 131]), iter([7, 7 + waited])
    monkeypatch.setattr(software, "time", SimpleNamespace(monotonic=lambda: next(times)))
    monkeypatch.setattr(software, "_waited_for_a_core", lambda: next(waits))
    (finding,) = software._import_torch()
    assert finding.status == status and finding.found.endswith(f"; {words}")


def test_waiting_for_a_core_is_counted_in_seconds():
    assert 0 <= software._waited_for_a_core() < time.monotonic()


def test_the_other_apex_is_named_and_never_imported(site):
    package = site.folder / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    finding = found("apex")
    assert finding.status == Status.WARNING
    assert f"the apex in {package} is not NVIDIA's but a toolkit for a web framework" in finding.found
    assert finding.advice.startswith("pip uninstall apex")
    assert "apex" not in sys.modules


def test_nvidias_apex_is_described_by_what_it_can_do(site):
    for name in (
        "apex/__init__.py",
        "apex/multi_tensor_apply/__init__.py",
        "apex/optimizers/fused_adam.py",
        "amp_C.py",
    ):
        path = site.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    assert found("apex").found == "NVIDIA's, with amp_C"


def test_a_torch_that_does_not_import_says_why(monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "torch":
                raise ImportError("libcudart.so.13: cannot open shared object file")

    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "torch")
        patch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
        finding = next(iter(software._import_torch()))
    assert finding.status == Status.PROBLEM
    assert "does not import: ImportError: libcudart.so.13: cannot open shared object file" in finding.found


@pytest.mark.parametrize(
    ("torch", "advice"),
    [
        ("2.13.0", "pip uninstall -y torchvision, and pip install torchvision torch==2.13.0"),
        (
            "2.13.0+cpu",
            "pip uninstall -y torchvision, and pip install torchvision torch==2.13.0+cpu --index-url URL, with the URL "
            "that https://pytorch.org/get-started/locally shows for cpu; or, for a torch with CUDA, pip uninstall -y "
            "torch torchvision, and pip install torch===2.13.0 torchvision",
        ),
        (
            "2.13.0+rocm7.1",
            "pip uninstall -y torchvision, and pip install torchvision torch==2.13.0+rocm7.1 --index-url URL, with the "
            "URL that https://pytorch.org/get-started/locally shows for rocm7.1",
        ),
        (
            "2.11.0a0+nv25.11",
            "this torch was not built by PyTorch: take torchvision from where torch came from, or build it; or pip "
            "uninstall torchvision, if you need neither timm nor open_clip",
        ),
    ],
)
def test_a_torchvision_of_another_build_is_named_with_what_to_install(site, monkeypatch, torch, advice):
    site("torch", torch)
    site("torchvision", "0.28.0")
    package = site.folder / "torchvision"
    package.mkdir()
    (package / "version.py").write_text("__version__ = '0.28.0+cu130'\ngit_version = '8fb8'\n")
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    (finding,) = check_torchvision()
    assert finding.status == Status.WARNING
    assert f"torchvision 0.28.0+cu130 does not import with torch {torch}, nor then does timm" in finding.found
    assert finding.found.endswith("RuntimeError: operator torchvision::nms does not exist")
    assert finding.advice == advice
    (package / "__init__.py").write_text("")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    importlib.invalidate_caches()
    assert [one.status for one in check_torchvision()] == [Status.OK]
