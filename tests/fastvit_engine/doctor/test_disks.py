"""The folders that a run writes to: room, permission, and what stands in their way."""

import os

import pytest

from fastvit_engine.doctor import disks
from fastvit_engine.doctor.findings import Status


def check(path, need=0):
    (finding,) = disks.check_disks({"run folder": str(path)}, {"run folder": need})
    return finding


def test_a_folder_that_is_still_to_be_made_has_the_room_of_the_one_above(tmp_path):
    finding = check(tmp_path / "runs" / "b16")
    assert finding.status == Status.OK
    assert finding.found.endswith(f"free in {tmp_path}/runs/b16")
    assert not (tmp_path / "runs").exists()


def test_too_little_room(tmp_path):
    finding = check(tmp_path, need=2**80)
    assert finding.status == Status.WARNING
    assert "should be" in finding.found and finding.advice == "make room, or choose another folder"


def test_no_inodes_left(tmp_path, monkeypatch):
    real = os.statvfs(tmp_path)
    values = list(real)
    values[5], values[7] = 1000, 0  # f_files, f_favail
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(values))
    assert "no inode" in check(tmp_path).found


def test_a_folder_that_may_not_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    finding = check(tmp_path)
    assert (finding.status, finding.found) == (Status.PROBLEM, f"this user may not write to {tmp_path}")


@pytest.mark.parametrize("below", ["", "/inside"])
def test_a_file_in_the_place_of_a_folder(tmp_path, below):
    (tmp_path / "file").write_text("")
    assert check(f"{tmp_path}/file{below}").found == f"{tmp_path}/file is not a folder"


def test_urls_are_not_disks(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/somewhere/triton")
    folders = disks.folders_of("s3://bucket/run", "/cache", "file:///checkpoints")
    assert folders.keys() == {"shard cache", "checkpoints", "TMPDIR", "compiled code"}
    assert folders["checkpoints"] == "/checkpoints"
    assert folders["compiled code"] == "/somewhere/triton"
