"""What environment.json says of software and machine."""

import torch

import fastvit_engine
import fastvit_kernels
from fastvit_engine.observe import environment
from fastvit_engine.observe.environment import collect_environment


def test_versions_of_both_distributions_and_of_what_they_run_on():
    versions = collect_environment()["versions"]
    assert versions["fastvit_engine"] == fastvit_engine.__version__
    assert versions["fastvit-kernels"] == fastvit_kernels.__version__
    assert versions["torch"] == torch.__version__
    assert versions["deepspeed"] and versions["webdataset"]


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(environment, "_PACKAGES", ("no-such-package",))
    assert collect_environment()["versions"]["no-such-package"] is None


def test_what_is_given_takes_precedence():
    assert collect_environment(command="mine")["command"] == "mine"
