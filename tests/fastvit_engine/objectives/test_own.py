"""`MODULE:NAME` leads to an objective of one's own, and an objective to its `MODULE:NAME`."""

import os
import sys
from functools import partial
from types import SimpleNamespace

import pytest

from fastvit_engine.errors import UserError
from fastvit_engine.objectives import find_objective, import_path


class Outer:
    class Inner:
        pass

    @classmethod
    def make(cls, config, device):
        return cls()

    def method(self, config, device):
        return self


@pytest.fixture
def module(tmp_path, monkeypatch):
    """module(source) -> the name of a new module in the working directory, which is in no search path yet."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", os.getcwd())])

    def write(source: str) -> str:
        name = f"objective_of_{os.urandom(4).hex()}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("objective_of_"):
            del sys.modules[name]


def test_a_module_is_found_in_the_working_directory(module):
    name = module("class Focal:\n    class Soft:\n        pass\ndef make(config, device):\n    pass\n")
    for attribute in ("Focal", "Focal.Soft", "make"):
        assert import_path(find_objective(f"{name}:{attribute}")) == f"{name}:{attribute}"
    assert sys.path.count(os.getcwd()) == 1


def test_the_working_directory_is_not_searched_if_python_was_told_not_to(module, monkeypatch):
    name = module("Focal = dict\n")
    flags = {flag: getattr(sys.flags, flag) for flag in dir(sys.flags) if not flag.startswith("_")}
    monkeypatch.setattr(sys, "flags", SimpleNamespace(**flags | {"safe_path": True}))
    with pytest.raises(UserError, match=f"there is no module {name}"):
        find_objective(f"{name}:Focal")


@pytest.mark.parametrize(
    ("source", "attribute", "said"),
    [
        ("", "Focal", r"objective_of_\w+\.py has no Focal: correct the name"),
        ("Focal = 3\n", "Focal", "Focal is no class or function"),
        ("Focal = dict\n", "Focal.soft", "has no Focal.soft"),
        ("x = 1\nFocal = 1 / 0\n", "Focal", r"fails with ZeroDivisionError .*objective_of_\w+\.py, line 2: fix"),
        ("def Focal(:\n", "Focal", "fails with SyntaxError"),
        ("import nowhere_to_be_found\n", "Focal", r"fails with ModuleNotFoundError .*'nowhere_to_be_found'"),
        ("raise SystemExit(3)\n", "Focal", r"fails with SystemExit \(3\)"),
    ],
)
def test_what_cannot_be_imported_is_one_sentence(module, source, attribute, said):
    path = f"{module(source)}:{attribute}"
    with pytest.raises(UserError, match=said) as refused:
        find_objective(path)
    assert f"train.objective is {path}" in str(refused.value)


@pytest.mark.parametrize("missing", ["nowhere_to_be_found", "nowhere_to_be_found.losses", "json.losses"])
def test_a_module_that_is_not_there_is_one_sentence(missing):
    with pytest.raises(UserError, match=r"there is no module \S+ in \S+ or among .*: start in its folder .*PYTHONPATH"):
        find_objective(f"{missing}:Focal")


@pytest.mark.parametrize("known", [Outer, Outer.Inner, Outer.make])
def test_the_top_level_of_a_module_has_an_import_path(known):
    assert import_path(known) == f"{__name__}:{known.__qualname__}"


def nested():
    class Nested:
        pass

    return Nested


@pytest.mark.parametrize("unknown", [lambda config, device: None, partial(Outer), nested(), Outer().method, Outer(), 3])
def test_what_a_resume_could_not_recognise_is_refused(unknown):
    with pytest.raises(UserError, match=r"no class or function at the top level .*: define one there"):
        import_path(unknown)


@pytest.mark.parametrize(
    ("main", "name"),
    [
        ({"__file__": "/somewhere/focal.py", "__spec__": None}, "focal"),
        ({"__file__": "/somewhere/focal-loss.py", "__spec__": None}, "__main__"),  # which nothing can import
        ({"__file__": "/somewhere/focal.py", "__spec__": SimpleNamespace(name="losses.focal")}, "losses.focal"),
        ({}, "__main__"),  # a notebook
    ],
)
def test_a_script_is_named_as_if_it_was_imported(main, name, monkeypatch):
    class Focal:
        __module__, __qualname__ = "__main__", "Focal"

    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__name__="__main__", Focal=Focal, **main))
    assert import_path(Focal) == f"{name}:Focal"
