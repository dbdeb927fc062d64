"""Cases that `make test` leaves out, as quicker ones prove nearly as much, and `make test-all` runs."""

import os

import pytest
from _pytest.mark import ParameterSet

IN_FULL = os.environ.get("FASTVIT_TEST_LONG") == "all"
only_in_full = pytest.mark.skipif(not IN_FULL, reason="quicker cases prove nearly as much: FASTVIT_TEST_LONG=all")


def in_full(*values: object) -> ParameterSet:
    """A case of `parametrize` for `make test-all` alone."""
    return pytest.param(*values, marks=only_in_full)
