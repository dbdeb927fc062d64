"""What control groups of both versions allow a process."""

import pytest

from fastvit_engine.control_groups import MemoryLimit, cpu_quota, memory_limit


@pytest.fixture
def system(tmp_path):
    """system(groups of the process, {file: content}) -> a root with these."""

    def make(groups, files):
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups)
        for name, content in files.items():
            path = tmp_path / "sys/fs/cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")
        return tmp_path

    return make


V1 = "4:cpu,cpuacct:/job\n3:memory:/job\n1:name=systemd:/job\n"


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/\n", {"cpu.max": "350000 100000"}, 3.5),
        ("0::/job/step\n", {"job/cpu.max": "400000 100000", "job/step/cpu.max": "max 100000"}, 4.0),
        ("0::/job/step\n", {"cpu.max": "200000 100000", "job/cpu.max": "400000 100000"}, 2.0),
        ("0::/../other\n", {"cpu.max": "200000 100000"}, 2.0),  # as a container sees the host's groups
        (V1, {"cpu,cpuacct/job/cpu.cfs_quota_us": 600000, "cpu,cpuacct/job/cpu.cfs_period_us": 100000}, 6.0),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100000}, None),
        ("0::/\n", {"cpu.max": "broken"}, None),
        ("0::/\n", {"cpu.max": "100000 0"}, None),
    ],
)
def test_the_least_quota_counts(system, groups, files, quota):
    assert cpu_quota(system(groups, files)) == quota


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"memory.max": "max", "memory.current": 5}, None),
        ("0::/job/step\n", {"job/memory.max": 2**33, "job/memory.current": 2**30, "job/step/memory.max": "max",
          "job/step/memory.current": 5}, (2**33, 2**30)),
        ("0::/job/step\n", {"job/memory.max": 2**33, "job/memory.current": 7, "job/step/memory.max": 2**33,
          "job/step/memory.current": 5}, (2**33, 7)),
        (V1, {"memory/memory.limit_in_bytes": 2**33, "memory/memory.usage_in_bytes": 7,
          "memory/job/memory.limit_in_bytes": 2**63 - 4096, "memory/job/memory.usage_in_bytes": 7}, (2**33, 7)),
        ("0::/\n", {"memory.max": 2**33}, (2**33, 0)),
        ("0::/\n", {"memory.max": "broken"}, None),
    ],
)  # fmt: skip
def test_the_least_memory_counts_and_what_is_used_of_it(system, groups, files, limit):
    assert memory_limit(system(groups, files)) == (None if limit is None else MemoryLimit(*limit))


def test_no_control_groups_are_no_limit(tmp_path):
    assert cpu_quota(tmp_path) is None and memory_limit(tmp_path) is None
