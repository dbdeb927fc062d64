"""No bytes from outside are unpickled: a pickle runs what it names."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Functions that may run what a file says, by the name that follows the last dot of the call, and what makes them safe.
DANGEROUS = {
    "pickle.load": None,
    "pickle.loads": None,
    "pickle.Unpickler": None,
    "dill.load": None,
    "dill.loads": None,
    "cloudpickle.load": None,
    "cloudpickle.loads": None,
    "pickle._Unpickler": None,
    "joblib.load": None,
    "marshal.load": None,
    "marshal.loads": None,
    "shelve.open": None,
    "torch.load": ("weights_only", True),
    "torch.jit.load": None,
    "torch.hub.load": None,
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "pd.read_pickle": None,
    "pandas.read_pickle": None,
    "yaml.load": None,
    "yaml.unsafe_load": None,
    "yaml.full_load": None,
    "eval": None,
    "exec": None,
}
DEFAULTS = {"np.load", "numpy.load"}  # which are safe unless their argument says otherwise
# What is allowed, and why.
ALLOWED = {
    # CIFAR's files are pickles; its Unpickler finds what arrays are made of and nothing else.
    ("fastvit_engine/data/build/sources/pixels.py", "pickle._Unpickler"),
    # Its loader is derived from yaml.SafeLoader.
    ("fastvit_engine/config/recipes.py", "yaml.load"),
}


def python_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    names = listed.stdout.splitlines() or [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py")]
    return [ROOT / name for name in names if not name.startswith((".venv", "tests/")) and (ROOT / name).is_file()]


def dangerous_calls(source: str) -> Iterator[str]:
    """The dotted names of what a file calls, or derives from, that may run what data says."""
    tree = ast.parse(source)
    renamed = {}  # as in `import numpy as n`, `from pickle import loads`
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            renamed |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            renamed |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name, keywords = dotted(node.func, renamed), {word.arg: word.value for word in node.keywords}
        elif isinstance(node, ast.ClassDef):
            yield from (name for base in node.bases if (name := dotted(base, renamed)) in DANGEROUS)
            continue
        else:
            continue
        if name not in DANGEROUS:
            continue
        safe = DANGEROUS[name]
        given = keywords.get(safe[0]) if safe else None
        is_safe = isinstance(given, ast.Constant) and safe is not None and given.value is safe[1]
        if not is_safe and not (given is None and name in DEFAULTS):
            yield name


def dotted(node: ast.expr, renamed: dict[str, str]) -> str:
    """ "np.load" for what is written so, and for what is imported under another name."""
    first, *rest = ast.unparse(node).split(".")
    name = ".".join([renamed.get(first, first), *rest])
    return name.removeprefix("builtins.")


def test_nothing_in_the_tree_unpickles_what_comes_from_outside():
    files = python_files()
    assert len(files) > 200
    found = {(str(path.relative_to(ROOT)), name) for path in files for name in dangerous_calls(path.read_text("utf-8"))}
    assert found == ALLOWED


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch\ntorch.load(f)", ["torch.load"]),
        ("import torch\ntorch.load(f, weights_only=False)", ["torch.load"]),
        ("import torch\ntorch.load(f, weights_only=True)", []),
        ("import numpy as np\nnp.load(f)", []),
        ("import numpy as n\nn.load(f, allow_pickle=True)", ["numpy.load"]),
        ("import numpy as np\nnp.load(f, allow_pickle=x)", ["np.load"]),
        ("from pickle import loads as f\nf(b)", ["pickle.loads"]),
        ("import pickle\nclass A(pickle.Unpickler): pass", ["pickle.Unpickler"]),
        ("import yaml\nyaml.load(f, yaml.Loader)", ["yaml.load"]),
        ("model.eval()\nself.load(x)\nre.compile(x)", []),
        ("eval(x)", ["eval"]),
    ],
)
def test_what_is_found(source, found):
    assert [name.replace("numpy", "np") for name in dangerous_calls(source)] == [
        name.replace("numpy", "np") for name in found
    ]
