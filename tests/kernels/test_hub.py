import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastvit_kernels
from fastvit_kernels.hub import __main__ as command
from fastvit_kernels.hub.build import BACKENDS, build, exchanged, imports

LOAD = """
import importlib.util, sys

def load(folder):
    name = json.loads((folder / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "kernel"
    build(out)
    return out


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def metadata(folder: Path, backend: str) -> dict[str, object]:
    return json.loads((folder / "build" / f"torch-{backend}" / "metadata.json").read_text())


def test_the_same_sources_give_the_same_bytes_and_each_build_its_own_name(folder: Path, tmp_path: Path) -> None:
    build(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)
    build(tmp_path / "other", "other-name")
    build(tmp_path / "newer", version=2)
    names = [metadata(f, b)["id"] for f in (folder, tmp_path / "other", tmp_path / "newer") for b in BACKENDS]
    assert len(set(names)) == 9 and all(str(name).isidentifier() for name in names)
    for built, backend in ((folder, "cuda"), (tmp_path / "other", "cpu")):
        assert (
            f'NAMESPACE = "{metadata(built, backend)["id"]}"'
            in contents(built)[f"build/torch-{backend}/registration.py"]
        )


def test_metadata(folder: Path) -> None:
    for backend in BACKENDS:
        found = metadata(folder, backend)
        digest = found.pop("digest")
        assert digest["algorithm"] == "sha256"
        files = contents(folder / "build" / f"torch-{backend}").keys() - {"metadata.json"}
        assert digest["files"].keys() == files
        assert str(found.pop("id")).startswith(f"_fastvit_kernels_{backend}_")
        assert found == {
            "name": "fastvit-kernels",
            "version": 1,
            "kernels-minver": "0.17.0",
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }


def test_all_imports_of_the_package_are_relative(folder: Path) -> None:
    modules = {path: text for path, text in contents(folder).items() if path.endswith(".py")}
    assert len(modules) > 60
    for path, text in modules.items():
        assert not list(imports(text)), path
        strings = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
        assert not any(isinstance(value, str) and value.startswith("fastvit_kernels.") for value in strings), path
    names = {path.rpartition("/")[2] for path in modules}
    assert not names & {"codegen.py", "tuning.py", "search.py", "build.py"}


def test_a_kernel_needs_torch_and_triton_alone(folder: Path) -> None:
    """Without this package and the libraries it knows, a variant runs both implementations, and explains itself."""
    script = f"""
import json, sys
from pathlib import Path
for name in ("fastvit_kernels", "timm", "transformers", "open_clip", "kernels", "torchvision"):
    sys.modules[name] = None
{LOAD}
kernel = load(Path({str(folder)!r}) / "build" / "torch-cpu")
import torch
print(json.dumps([kernel.explain(), sorted(kernel.__all__)]))
x = torch.randn(3, 24, requires_grad=True)
weight, bias = torch.rand(24, requires_grad=True), torch.rand(24)
expected = torch.nn.functional.layer_norm(x, (24,), weight, bias, 1e-6)
for implementation in ("reference", "triton"):
    with kernel.dispatch.using(implementation):
        y = kernel.layer_norm(x, weight, bias)
    torch.testing.assert_close(y, expected)
    for pair in zip(*(torch.autograd.grad(z.sin().sum(), (x, weight), retain_graph=True) for z in (y, expected))):
        torch.testing.assert_close(*pair)
assert hasattr(torch.ops, kernel.__name__) and y.grad_fn.name().count(kernel.__name__)
table = str(kernel.accelerate(torch.nn.Sequential(torch.nn.LayerNorm(24))))
assert "layer_norm" in table, table
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FASTVIT_KERNELS": "auto"}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    explained, names = json.loads(ran.stdout)
    with fastvit_kernels.dispatch.using("auto"):
        assert explained == fastvit_kernels.explain()
    assert names == sorted([*fastvit_kernels.__all__, "layers"])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["hub", *words])
        return command.main()

    out = tmp_path / "kernel"
    assert run("--out", str(out), "--name", "vit", "--version", "3") == 0
    assert capsys.readouterr().out.splitlines()[:3] == [str(out / "build" / f"torch-{b}") for b in BACKENDS]
    assert (metadata(out, "rocm")["name"], metadata(out, "rocm")["version"]) == ("vit", 3)
    card = (out / "README.md").read_text()
    assert "NAME" not in card and "vit" in card
    for words, said in (
        (["--out", str(out)], f"{out} exists and is not an empty folder"),
        (["--out", str(tmp_path / "b"), "--name", "Vit_"], "name must be lower-case letters, digits and dashes"),
        (["--out", str(tmp_path / "b"), "--version", "0"], "version must be at least 1, got 0"),
    ):
        assert run(*words) == 2
        assert capsys.readouterr().err.startswith(f"fastvit_kernels.hub: {said}")
    assert not (tmp_path / "b").exists()


def test_sources_that_a_kernel_cannot_hold() -> None:
    with pytest.raises(ValueError, match="import fastvit_kernels.table: a kernel needs imports that can be made rel"):
        list(imports("import fastvit_kernels.table"))
    with pytest.raises(ValueError, match="'a' must be in the source once, and is 2 times"):
        exchanged("a a", "a", "b")
