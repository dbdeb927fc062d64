import os
import signal
from collections.abc import Iterator
from itertools import zip_longest

import pytest
import torch
from hypothesis import settings

# Without a GPU, Triton kernels are tested by Triton's interpreter, on the CPU. Triton reads this when it is imported,
# so it is set here, before any test module is. It changes nothing for tests that run no Triton kernel.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# No property test depends on how busy the machine is; pytest-timeout ends one that hangs.
settings.register_profile("any load", deadline=None)
settings.load_profile("any load")


@pytest.fixture
def hangups_arrive() -> Iterator[None]:
    """Undoes what `nohup` does to the suite and to every process that a test starts."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests early, so that no process is left with a long one at the end.

    They mostly wait. After each comes a file of tests that compute: those of kernels, then all others.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    files = list(dict.fromkeys(item.path for item in items))
    waiting = [path for path in files if path in slow]
    computing = sorted((path for path in files if path not in slow), key=lambda path: "kernels" not in path.parts)
    alternating = [path for pair in zip_longest(waiting, computing) for path in pair]
    places = {path: place for place, path in enumerate(alternating)}
    items.sort(key=lambda item: places[item.path])
