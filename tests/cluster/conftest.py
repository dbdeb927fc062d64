import pytest
from hosts import Hosts, missing


@pytest.fixture(scope="session")
def hosts():
    """Three hosts on a network of their own."""
    if reason := missing():
        pytest.skip(reason)
    with Hosts(3) as three:
        yield three
