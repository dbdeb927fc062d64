"""The files around the code agree with it: targets, workflows, hooks and versions."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import fastvit_engine
import fastvit_kernels

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def read(path: Path) -> dict[Any, Any]:
    content = yaml.safe_load(path.read_text())
    assert isinstance(content, dict)
    return content


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_make_help_lists_every_target() -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert {line.split()[1] for line in done.stdout.splitlines()} == targets()


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", ".ci/run", ".github/pull_request_template.md", ".pre-commit-config.yaml"]
)
def test_every_target_that_is_named_exists(page: str) -> None:
    named = set(re.findall(r"\bmake ([a-z-]+)\b(?=`|;| *#|$)", (ROOT / page).read_text(), re.MULTILINE))
    assert named and named <= targets()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_what_a_developer_can_run(path: Path) -> None:
    steps = [step for job in read(path)["jobs"].values() for step in job["steps"]]
    commands = [step["run"] for step in steps if "run" in step]
    expected = {"ci": ".ci/run", "nightly": "sudo make test-all", "site": "make site", "release": "make dist"}[
        path.stem
    ]
    assert expected in commands and {word.partition(" ")[0] for word in expected.split("make ")[1:]} <= targets()
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


@pytest.mark.parametrize("path", [form for form in FORMS if form.stem != "config"], ids=lambda path: path.stem)
def test_an_issue_form_has_what_github_asks_for(path: Path) -> None:
    form = read(path)
    assert form["name"] and form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)


def test_hooks_run_what_make_lint_runs() -> None:
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    programs = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in repository["hooks"]}
    linted = set(re.findall(r"^\t\$\(BIN\)/([\w-]+)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"ruff", "mypy", "lint-imports"} <= programs & linted


def versions(root: Path) -> set[str]:
    """Every version that the files of a checkout say for the two packages."""
    files = (root / "fastvit_engine" / "__init__.py", root / "kernels" / "fastvit_kernels" / "__init__.py")
    said = [found for file in files for found in re.findall(r'^__version__ = "(.*)"$', file.read_text(), re.MULTILINE)]
    needs = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    said += [need.partition("==")[2] for need in needs if need.startswith("fastvit-kernels")]
    said.append(read(root / "CITATION.cff")["version"])
    assert len(said) == 4
    return set(said)


def test_one_version_everywhere() -> None:
    assert versions(ROOT) == {fastvit_engine.__version__}
    assert fastvit_engine.__version__ == fastvit_kernels.__version__
    citation = read(ROOT / "CITATION.cff")
    assert citation["license"] == "Apache-2.0" and citation["authors"]


def test_no_torch_is_allowed_whose_triton_is_not() -> None:
    """Else pip downloads each such torch, with its CUDA libraries, before it finds that out."""
    of_torch = {"2.11.0": "3.6.0", "2.13.0": "3.7.1", "2.14.0": "3.8.0", "2.14.1": "3.8.0"}  # the Triton of each
    declared = tomllib.loads((ROOT / "kernels" / "pyproject.toml").read_text())["project"]["dependencies"]
    allowed = {requirement.name: requirement.specifier for requirement in map(Requirement, declared)}
    for torch, triton in of_torch.items():
        assert (torch in allowed["torch"]) == (triton in allowed["triton"]), f"torch {torch} brings triton {triton}"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that say a version, and the Makefile."""
    engine, kernels = "fastvit_engine/__init__.py", "kernels/fastvit_kernels/__init__.py"
    for name in ("Makefile", "constraints.txt", "pyproject.toml", "CITATION.cff", engine, kernels):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def set_version(checkout: Path, line: str) -> None:
    """Writes a line of a version into the one file that is edited by hand."""
    file = checkout / "fastvit_engine" / "__init__.py"
    file.write_text(re.sub(r"^__version__ = .*$", line, file.read_text(), flags=re.MULTILINE))


@pytest.mark.parametrize("version", [fastvit_engine.__version__, "1.10.0rc1", "2.10"])
def test_make_version_writes_the_version_of_one_file_into_the_others(checkout: Path, version: str) -> None:
    set_version(checkout, f'__version__ = "{version}"')
    subprocess.run(["make", "version"], cwd=checkout, capture_output=True, check=True)
    assert versions(checkout) == {version}
    if version == fastvit_engine.__version__:  # nothing else changes
        files = [path.relative_to(checkout) for path in checkout.rglob("*") if path.is_file()]
        assert all((checkout / file).read_bytes() == (ROOT / file).read_bytes() for file in files)


@pytest.mark.parametrize("line", ["__version__ = VERSION", '__version__ = "next/one"', ""])
def test_make_version_refuses_what_is_no_version(checkout: Path, line: str) -> None:
    set_version(checkout, line)
    done = subprocess.run(["make", "version"], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 2
    assert "fastvit_engine/__init__.py has no line such as" in done.stdout
    assert (checkout / "pyproject.toml").read_bytes() == (ROOT / "pyproject.toml").read_bytes()


def test_owned_paths_exist() -> None:
    lines = (ROOT / ".github" / "CODEOWNERS").read_text().splitlines()
    paths = [line.split()[0] for line in lines if line and not line.startswith("#")]
    assert paths and all((ROOT / path.strip("/")).exists() for path in paths)


def test_the_changelog_has_an_unreleased_section() -> None:
    assert "\n## [Unreleased]\n" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "kernels/CONTRIBUTING.md"])
def test_every_path_that_is_named_exists(page: str) -> None:
    """Names in capitals and in <> stand for what a contributor chooses."""
    folder = (ROOT / page).parent
    named = set(re.findall(r"`([\w.]+(?:/[\w.]+)*/?)`", (ROOT / page).read_text()))
    paths = {name for name in named if "/" in name and not re.search(r"\b[A-Z]{2,}\b", name)}
    assert paths
    missing = {path for path in paths if not any((base / path).exists() for base in (ROOT, folder))}
    assert not missing
