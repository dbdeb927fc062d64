"""The two distributions, `fastvit-kernels` and `fastvit-engine`, are complete and declare what they need.

An installed wheel is imported in a process that finds the packages it requires, and those they require, and no other:
an import that no dependency declares fails there, as it would on a new machine.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
SOURCES = {"fastvit_kernels": ROOT / "kernels" / "fastvit_kernels", "fastvit_engine": ROOT / "fastvit_engine"}
# Runs code in a Python that cannot find the modules named in its first argument, a list separated by commas.
HIDING = """
import importlib.machinery, sys
hidden = set(sys.argv.pop(1).split(","))
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)
sys.meta_path[:] = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
"""
# Imports every module of a package. Those of integrations/ and trackers/ may lack the library they are named after.
IMPORT_ALL = """
import importlib, pkgutil
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    *_, folder, name = module.name.split(".")
    try:
        if name != "__main__":
            importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        optional = error.name.partition(".")[0]  # what an integration or a tracker is for, Ray, and QuACK's compiler
        named_after = name.startswith(f"{optional}_") or (folder in ("integrations", "trackers") and optional == name)
        if not named_after and (name, optional) != ("quack_kernels", "cutlass"):
            raise
print(package.__file__, package.__version__)
"""
COMMAND = "from fastvit_engine.cli import main; sys.exit(main())"
OURS = {"fastvit-kernels", "fastvit-engine"}


def project(folder: Path) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return table


def files(folder: Path) -> set[str]:
    """What git would track of a package, as paths inside its distribution."""
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder.parent)) for path in paths}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel of each package, built without a network from a copy of the sources."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheels")
    for folder in (".", "kernels"):
        (copy / folder).mkdir(exist_ok=True)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / folder / name, copy / folder)
    for source in SOURCES.values():
        shutil.copytree(source, copy / source.relative_to(ROOT), ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*command, "-w", out, "./kernels", "."], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.name.partition("-")[0]: path for path in out.glob("*.whl")}


def required(requirements: list[str], extras: frozenset[str] = frozenset()) -> Iterator[tuple[str, frozenset[str]]]:
    """(distribution, its extras) for each of `requirements` that applies on this machine under `extras`."""
    for requirement in map(Requirement, requirements):
        environments = [{"extra": extra} for extra in extras or {""}]
        if requirement.marker is None or any(map(requirement.marker.evaluate, environments)):
            yield canonicalize_name(requirement.name), frozenset(requirement.extras)


@dataclass(frozen=True)
class Installation:
    """A wheel in a folder of its own, and the names of the distributions it requires, directly or not."""

    folder: Path
    needs: frozenset[str]

    @classmethod
    def of(cls, wheel: Path, folder: Path, extras: frozenset[str] = frozenset()) -> "Installation":
        with zipfile.ZipFile(wheel) as archive:  # which is what pip does with one of Python alone
            archive.extractall(folder)
        (own,) = importlib.metadata.distributions(path=[str(folder)])
        found: set[tuple[str, frozenset[str]]] = set()
        waiting = list(required(own.requires or [], extras))
        while waiting:
            name, wanted = waiting.pop()
            if (name, wanted) not in found and name not in OURS:
                found.add((name, wanted))
                waiting += required(importlib.metadata.distribution(name).requires or [], wanted)
        return cls(folder, frozenset(name for name, _ in found))


def run(code: str, *arguments: str, installed: list[Installation], cwd: Path) -> str:
    """What `code` prints in a process that finds what is `installed`, what that requires, and nothing else."""
    needs = frozenset().union(*(each.needs for each in installed))
    hidden = {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not needs.intersection(map(canonicalize_name, owners)) and module not in SOURCES
    }
    path = [*(str(each.folder) for each in installed), sysconfig.get_path("purelib")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", "-P", "-c", HIDING + code, ",".join(hidden), *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("package", SOURCES)
def test_a_wheel_holds_every_file_of_its_package_and_nothing_else(wheels: dict[str, Path], package: str) -> None:
    with zipfile.ZipFile(wheels[package]) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        licenses = [name for name in archive.namelist() if name.endswith("dist-info/licenses/LICENSE")]
        assert archive.read(licenses[0]) == (ROOT / "LICENSE").read_bytes()
    assert held == files(SOURCES[package])
    assert f"{package}/py.typed" in held


@pytest.mark.slow
def test_the_kernels_need_torch_triton_and_numpy_alone(wheels: dict[str, Path], tmp_path: Path) -> None:
    kernels = Installation.of(wheels["fastvit_kernels"], tmp_path / "kernels")
    assert {"torch", "triton", "numpy"} <= kernels.needs
    assert not {"deepspeed", "pydantic", "pyyaml", "webdataset", "timm"} & kernels.needs
    origin, version = run(IMPORT_ALL, "fastvit_kernels", installed=[kernels], cwd=tmp_path).split()
    assert Path(origin).is_relative_to(kernels.folder)
    assert version == wheels["fastvit_kernels"].name.split("-")[1]


@pytest.mark.slow
def test_the_engine_needs_the_kernels_and_its_extra_alone(wheels: dict[str, Path], tmp_path: Path) -> None:
    kernels = Installation.of(wheels["fastvit_kernels"], tmp_path / "kernels")
    engine = Installation.of(wheels["fastvit_engine"], tmp_path / "engine", frozenset({"train"}))
    assert {"deepspeed", "webdataset", "pydantic", "pyyaml"} <= engine.needs
    assert not {"timm", "pyarrow", "obstore", "pytest"} & engine.needs
    origin, version = run(IMPORT_ALL, "fastvit_engine", installed=[engine, kernels], cwd=tmp_path).split()
    assert Path(origin).is_relative_to(engine.folder)
    assert version == wheels["fastvit_engine"].name.split("-")[1]
    listed = run(COMMAND, "config", "list", installed=[engine, kernels], cwd=tmp_path)
    recipes = [file.stem for file in (ROOT / "fastvit_engine" / "recipes").rglob("[!_]*.yaml")]
    assert recipes and all(re.search(rf"\b{name}\b", listed) for name in recipes)
    listed = run(COMMAND, "study", "--help", installed=[engine, kernels], cwd=tmp_path)
    studies = [file.stem for file in (ROOT / "fastvit_engine" / "studies").glob("*.yaml")]
    assert studies and all(re.search(rf"\b{name}\b", listed) for name in studies)


def test_a_package_that_nothing_requires_is_not_found(wheels: dict[str, Path], tmp_path: Path) -> None:
    kernels = Installation.of(wheels["fastvit_kernels"], tmp_path / "kernels")
    with pytest.raises(AssertionError, match="No module named 'pydantic'"):
        run("import pydantic", installed=[kernels], cwd=tmp_path)


def test_the_engine_requires_the_kernels_of_its_own_version(wheels: dict[str, Path]) -> None:
    versions = {package: wheel.name.split("-")[1] for package, wheel in wheels.items()}
    assert versions["fastvit_kernels"] == versions["fastvit_engine"]
    assert f"fastvit-kernels=={versions['fastvit_kernels']}" in project(ROOT)["dependencies"]


def test_every_dependency_of_a_developer_has_a_pinned_version() -> None:
    pinned = set()
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            assert version
            pinned.add(canonicalize_name(name))
    tables = {"fastvit-kernels": project(ROOT / "kernels"), "fastvit-engine": project(ROOT)}
    waiting, seen, external = [("fastvit-engine", frozenset({"dev", "docs"}))], set(), set()
    while waiting:
        name, extras = waiting.pop()
        if name not in OURS:
            external.add(name)
        elif (name, extras) not in seen:
            seen.add((name, extras))
            table = tables[name]
            waiting += required(table["dependencies"])
            waiting += [need for extra in extras for need in required(table["optional-dependencies"][extra])]
    assert "torch" in external and "pyarrow" in external
    assert external <= pinned
