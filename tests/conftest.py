import os
import signal
from collections.abc import Iterator

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
    """Files with slow tests first, so that no process is left with a long one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
