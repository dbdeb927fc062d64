"""The cores that a process may use."""

import os

import pytest

from fastvit_engine.cores import core_share, cores_here


@pytest.mark.parametrize(
    ("quota", "share", "cores"), [(None, 16, 16), (350000, 3.5, 3), (50000, 0.5, 1), (9e6, 16, 16)]
)
def test_affinity_and_quota_count(tmp_path, monkeypatch, quota, share, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    if quota is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text("0::/\n")
        (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
        (tmp_path / "sys/fs/cgroup/cpu.max").write_text(f"{quota:.0f} 100000\n")
    assert core_share(tmp_path) == share
    assert cores_here(tmp_path) == cores
