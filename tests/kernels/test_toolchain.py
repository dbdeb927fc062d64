"""Which ptxas compiles, and what is known of it."""

from pathlib import Path

import pytest

from fastvit_kernels import toolchain

pytest.importorskip("triton.backends.nvidia")


@pytest.mark.parametrize(
    ("arch", "triton", "ptxas", "sources"),
    [
        ("sm_90", "3.7.1", (12, 8, 93), {"fla-org/flash-linear-attention#1262", "triton-lang/triton#11366"}),
        ("sm_90", "3.7.1", (13, 0, 88), {"fla-org/flash-linear-attention#1262", "triton-lang/triton#11366"}),
        ("sm_90", "3.8.0", (13, 1, 80), set()),
        ("sm_100", "3.7.1", (13, 1, 80), {"triton-lang/triton#10821"}),
        ("sm_103", "3.9.0+git1234", (13, 1, 80), set()),
        ("sm_80", "3.7.1", (12, 8, 93), set()),
    ],
)
def test_faults_apply_by_gpu_and_versions(arch: str, triton: str, ptxas: tuple[int, ...], sources: set[str]) -> None:
    assert {fault.source for fault in toolchain.faults(arch, triton, ptxas)} == sources


def ptxas(folder: Path, version: str) -> Path:
    """A program that says it is a ptxas of this version."""
    path = folder / "ptxas"
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version.rpartition('.')[0]}, V{version}'\n")
    path.chmod(0o755)
    return path


def test_the_assembler_is_tritons_own_or_that_of_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    own = toolchain.assembler("sm_90")
    assert own.origin.startswith("shipped with Triton 3.") and len(own.version) == 3
    other = ptxas(tmp_path, "13.3.73")
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(other))
    assert toolchain.assembler("sm_90") == (str(other), (13, 3, 73), "TRITON_PTXAS_PATH")
    assert toolchain.describe("sm_90").startswith(f"assembler: ptxas 13.3.73 for sm_90 (TRITON_PTXAS_PATH: {other})")
    assert toolchain.assembler("sm_100").path != str(other)  # it has a variable of its own


def test_a_variable_that_names_nothing_does_not_go_unnoticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tmp_path / "none"))
    assert "as TRITON_PTXAS_PATH=" in toolchain.describe("sm_90")


def test_faults_are_described(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(ptxas(tmp_path, "12.8.93")))
    assert "reported with it: wrong numbers" in toolchain.describe("sm_90")
    assert toolchain.describe("gfx942") == "assembler: Triton's own for gfx942"


def test_an_assembler_that_does_not_run_is_named(tmp_path: Path) -> None:
    for name, script in (("fails", "#!/bin/sh\nexit 3\n"), ("silent", "#!/bin/sh\n")):
        program = tmp_path / name
        program.write_text(script)
        program.chmod(0o755)
        with pytest.raises(RuntimeError, match=f"{name} --version (does not run|names no version)"):
            toolchain.version_of(str(program))
    with pytest.raises(RuntimeError, match="absent --version does not run"):
        toolchain.version_of(str(tmp_path / "absent"))
