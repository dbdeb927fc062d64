"""The cores that a process may use."""

import os

import pytest

from fastvit_engine.cores import cores_here


@pytest.fixture
def system(tmp_path, monkeypatch):
    """system(groups of the process, {file: content}) -> a root with these; the process may use 16 cores by affinity."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))

    def make(groups, files):
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups)
        for name, content in files.items():
            path = tmp_path / "sys/fs/cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {}, 16),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 16),
        ("0::/\n", {"cpu.max": "350000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/job/step\n", {"job/cpu.max": "400000 100000\n", "job/step/cpu.max": "max 100000\n"}, 4),
        ("0::/job/step\n", {"cpu.max": "200000 100000\n", "job/cpu.max": "400000 100000\n"}, 2),
        ("0::/../other\n", {"cpu.max": "200000 100000\n"}, 2),  # as a container sees the host's groups
        ("4:cpu,cpuacct:/job\n3:memory:/job\n", {"cpu,cpuacct/job/cpu.cfs_quota_us": "600000\n",
          "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n"}, 6),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 16),
        ("0::/\n", {"cpu.max": "broken"}, 16),
    ],
)  # fmt: skip
def test_a_quota_counts_as_so_many_cores(system, groups, files, cores):
    assert cores_here(system(groups, files)) == cores


def test_affinity_counts_and_no_control_groups_are_no_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 6})
    assert cores_here(tmp_path) == 3
