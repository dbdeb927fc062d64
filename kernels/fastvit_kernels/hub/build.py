"""Writes a folder that the Hugging Face `kernels` package loads, from the source files of this package.

The folder has one variant per backend, `build/torch-<backend>`, with the same code: this package without its tools, its
imports made relative, and `layers`. A variant is loaded under the unique name in its `metadata.json`, and its operators
are registered under that name, so that it may live in one process beside this package and beside other builds.
"""

import ast
import base64
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
NAME = PACKAGE.name
LAYERS = f"{NAME}.hub.layers"  # is `layers` at the top of a kernel, where `kernels` looks for it
BACKENDS = ("cpu", "cuda", "rocm")
OLDEST = "0.17.0"  # `kernels` that reads this layout
DATA = "tuning/configs/*.json"
CARD = Path(__file__).with_name("card.md")


def build(out: Path, name: str = "fastvit-kernels", version: int = 1) -> list[Path]:
    """Writes the kernel `name` into the folder `out`, which must be new or empty, and returns its variants.

    The same sources, name and version give the same bytes. Raises ValueError for a name or version that `kernels` does
    not take, FileExistsError if `out` holds something.
    """
    if not re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", name):
        raise ValueError(f"name must be lower-case letters, digits and dashes, as in fastvit-kernels, got {name!r}")
    if version < 1:
        raise ValueError(f"version must be at least 1, got {version}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder: remove it, or name another")
    files = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.glob(DATA)}
    files |= {target(module): relative(module) for module in needed()}
    variants = []
    for backend in BACKENDS:
        variants.append(out / "build" / f"torch-{backend}")
        write(variants[-1], files, name, version, backend)
    (out / "README.md").write_text(CARD.read_text().replace("NAME", name))
    return variants


def write(folder: Path, files: dict[str, str], name: str, version: int, backend: str) -> None:
    """One variant, and its metadata with a digest of each file."""
    content = json.dumps([name, version, backend, sorted(files.items())])
    identity = f"_{name.replace('-', '_')}_{backend}_{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    files = files | {"registration.py": exchanged(files["registration.py"], '"fastvit"', f'"{identity}"')}
    digests = {}
    for path, text in sorted(files.items()):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
        digests[path] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    metadata = {
        "id": identity,
        "name": name,
        "version": version,
        "kernels-minver": OLDEST,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def needed() -> list[str]:
    """The modules that a kernel consists of: what users import, and all that is imported for it."""
    found: set[str] = set()
    waiting = [NAME, LAYERS, *(f"{NAME}.integrations.{path.stem}" for path in PACKAGE.glob("integrations/*.py"))]
    while waiting:
        module = waiting.pop().removesuffix(".__init__")
        if module in found:
            continue
        found.add(module)
        if module.count(".") > 1 and module != LAYERS:
            waiting.append(module.rpartition(".")[0])
        for statement in imports(source(module).read_text()):
            names = [f"{statement.module}.{alias.name}" for alias in statement.names]
            waiting += [statement.module or NAME, *(name for name in names if source(name).exists())]
    return sorted(found)


def imports(text: str) -> Iterator[ast.ImportFrom]:
    """The imports from this package, wherever in the text they are."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(alias.name.partition(".")[0] == NAME for alias in node.names):
            raise ValueError(f"{ast.unparse(node)}: a kernel needs imports that can be made relative: from ... import")
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == NAME:
            yield node


def source(module: str) -> Path:
    """The file of a module or package of this package; one that does not exist for any other name."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def target(module: str) -> str:
    """Where a module is in a kernel."""
    return "layers.py" if module == LAYERS else source(module).relative_to(PACKAGE).as_posix()


def relative(module: str) -> str:
    """The text of a module with relative imports; that of the package itself imports and names `layers` as well."""
    text = source(module).read_text()
    lines = text.splitlines(keepends=True)
    dots = "." * (target(module).count("/") + 1)
    statements = list(imports(text))
    for statement in statements:
        absolute = f"from {statement.module} import"
        line = lines[statement.lineno - 1]
        lines[statement.lineno - 1] = exchanged(line, absolute, f"from {dots}{path_in_package(statement)} import")
    if module == NAME:
        first = min(statement.lineno for statement in statements)
        lines.insert(first - 1, "from . import layers\n")
        return exchanged("".join(lines), "__all__ = [\n", '__all__ = [\n    "layers",\n')
    return "".join(lines)


def path_in_package(statement: ast.ImportFrom) -> str:
    return (statement.module or NAME).removeprefix(NAME).removeprefix(".")


def exchanged(text: str, old: str, new: str) -> str:
    """`text` with `new` for `old`, which must be in it once."""
    if text.count(old) != 1:
        raise ValueError(f"{old!r} must be in the source once, and is {text.count(old)} times")
    return text.replace(old, new)
