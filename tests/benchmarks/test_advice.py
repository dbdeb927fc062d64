"""Advice of the benchmarks: packages, commands and variables that sentences name exist, and following them helps."""

import importlib
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

from benchmarks.data_loading.dali import DALI
from benchmarks.data_loading.spdl import SPDL
from benchmarks.data_loading.variants import VARIANTS
from benchmarks.kernels import pick_known
from fastvit_engine.cli import _parser
from fastvit_engine.nvidia_apex import APART, EXTENSIONS, obstacle

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "benchmarks").rglob("*.py"))


def _extras() -> dict[str, set[str]]:
    """The distributions of each extra, without versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {
        name: {re.split(r"[\s<>=!~;\[]", package)[0].lower() for package in packages}
        for name, packages in project["optional-dependencies"].items()
    }


@pytest.mark.parametrize("variant", [*VARIANTS, DALI, SPDL], ids=lambda variant: variant.name)
def test_a_loader_that_is_missing_says_what_pip_installs(variant, monkeypatch):
    """A module may be of a package with another name; `nvidia` is of many."""
    installed = [module for module in variant.packages if is_installed(module)]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    sentence = variant.missing()
    if not variant.packages:
        assert sentence is None
        return
    packages = sentence.partition(": pip install ")[2].split()
    assert packages
    known = importlib.metadata.packages_distributions()
    for module in installed:
        assert set(known[module.partition(".")[0]]) & set(packages), f"{module} is not of {packages}"


def is_installed(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


def test_pictures_come_with_the_extra_that_is_named():
    named = {n for path in SOURCES for n in re.findall(r"fastvit-engine\[(\w+)\]", path.read_text())}
    assert named == {"bench"} <= _extras().keys()
    assert "matplotlib" in _extras()["bench"]


def test_commands_that_sentences_name_are_accepted():
    commands = {c for path in SOURCES for c in re.findall(r"run (fastvit bench [a-z ]+)[\"`,]", path.read_text())}
    assert "fastvit bench readme" in commands
    for command in commands:
        _parser().parse_args(command.split()[1:])


@pytest.mark.parametrize("module", sorted(EXTENSIONS))
def test_apex_that_is_built_as_advised_has_the_extension(module, tmp_path, monkeypatch):
    """What apex's setup.py builds by each variable: the two that are for all, and one for each part of its own."""
    built = {
        "APEX_CPP_EXT=1": set(),
        "APEX_CUDA_EXT=1": {"amp_C", "fused_layer_norm_cuda", "fused_dense_cuda"},
        "APEX_FAST_LAYER_NORM=1": {"fast_layer_norm"},
        "APEX_XENTROPY=1": {"xentropy_cuda"},
    }
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "apex" / "multi_tensor_apply").mkdir(parents=True)
    file = tmp_path / Path(*module.split(".")).with_suffix(".py")
    file.parent.mkdir(parents=True, exist_ok=True)
    for path in (tmp_path / "apex" / "__init__.py", file):
        path.touch()
    sentence = obstacle(module)
    assert sentence is not None and "without its extension" in sentence
    for variable in re.findall(r"APEX_\w+=1", sentence):
        for extension in built[variable]:
            (tmp_path / f"{extension}.py").touch()
    importlib.invalidate_caches()
    assert obstacle(module) is None
    assert APART.keys() <= set(EXTENSIONS.values())


def test_names_that_a_refusal_gives_are_taken():
    known = ["attention", "mlp, plain"]
    for given in ("atention", "xyz"):
        with pytest.raises(ValueError, match=f"no operation '{given}'") as refused:
            pick_known("operation", [given], known)
        named = re.findall("'([^']+)'", str(refused.value))[1:]
        assert named in (known, known[:1])
        pick_known("operation", named, known)
