import sys

import pytest

from benchmarks.apex_detection import need_apex
from benchmarks.registry import Unusable
from fastvit_engine.nvidia_apex import EXTENSIONS, obstacle

NORM = "apex.normalization.fused_layer_norm"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of packages that come first."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")


def test_absent(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert obstacle(NORM).startswith("apex is not installed: build NVIDIA's from github.com/NVIDIA/apex")


def test_the_other_package_of_that_name_is_told_apart_and_never_imported(site):
    write(site, "apex/lib/__init__.py", "apex/models/__init__.py")
    (site / "apex" / "__init__.py").write_text("raise SystemExit('imported')")
    for module in EXTENSIONS:
        assert "is not NVIDIA's" in obstacle(module)
    with pytest.raises(Unusable, match="the package index has another one"):
        need_apex(NORM)


def test_nvidias_by_what_it_can_do(site):
    write(site, "apex/__init__.py", "apex/multi_tensor_apply/__init__.py")
    assert obstacle(NORM) == f"this version of apex has no {NORM}"
    write(site, "apex/normalization/__init__.py", "apex/normalization/fused_layer_norm.py")
    assert "without its extension fused_layer_norm_cuda" in obstacle(NORM)
    write(site, "fused_layer_norm_cuda.py")
    assert obstacle(NORM) is None
    assert need_apex(NORM).__name__ == NORM
    (site / "apex" / "normalization" / "__init__.py").write_text("raise OSError('undefined symbol')")
    for name in [name for name in sys.modules if name.startswith("apex")]:
        del sys.modules[name]
    with pytest.raises(Unusable, match="does not import: OSError: undefined symbol"):
        need_apex(NORM)
