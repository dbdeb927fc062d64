import multiprocessing
from pathlib import Path

import pytest

from fastvit_engine.data import prepare_data


def _own_memory(process: multiprocessing.process.BaseProcess) -> int:
    """Resident bytes that no other process shares by design: neither files nor the memory of the batches."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_memory_of_workers_stays_flat_over_100_000_samples(tmp_path, write_tar, photo, make_config):
    for shard in range(4):
        numbers = range(500 * shard, 500 * shard + 500)
        pairs = [((f"s{n}.jpg", photo(n % 50, 8 + n % 30, 9 + n % 20)), (f"s{n}.cls", b"1")) for n in numbers]
        write_tar(tmp_path / f"{shard}.tar", [member for pair in pairs for member in pair])
    config = make_config(tmp_path, batch=250, num_workers=2, lanes=4, window=64)
    plan = prepare_data(config, world_size=1, index_folder=tmp_path)
    before = set(multiprocessing.active_children())
    batches = plan.train_batches(config, rank=0, world_size=1, micro_batch_size=250, consumed=0, pin_memory=False)
    for _ in range(20_000 // 250):  # ten epochs: every buffer has grown to what it needs
        next(batches)
    workers = [process for process in multiprocessing.active_children() if process not in before]
    start = [_own_memory(worker) for worker in workers]
    for _ in range(100_000 // 250):
        next(batches)
    grown = [_own_memory(worker) - memory for worker, memory in zip(workers, start, strict=True)]
    assert len(grown) == 2 and max(grown) < 2 << 20  # 20 bytes a sample would be a leak
