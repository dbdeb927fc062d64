"""A folder in /tmp is used only if it is this user's and nobody else may write there."""

import os
import stat
from pathlib import Path

import pytest

from fastvit_engine.cli import main
from fastvit_engine.errors import UserError
from fastvit_engine.storage import ShardStorage
from fastvit_engine.trusted_folders import trust_compiled_code, trusted_folder

VARIABLES = ["TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR"]


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder like /tmp."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_missing_below_a_shared_folder_is_made_for_this_user_only(shared):
    trusted_folder(shared / "a" / "b", "X")
    assert mode(shared / "a") == mode(shared / "a" / "b") == 0o700
    trusted_folder(shared / "a" / "b", "X")  # and can be used again
    (shared / "a").chmod(0o755)  # which others may read
    trusted_folder(shared / "a" / "b", "X")


@pytest.mark.parametrize(
    ("which", "permissions"),
    [(which, permissions) for which in ("a", "a/b") for permissions in (0o777, 0o775, 0o707)] + [("a/b", 0o1777)],
)
def test_a_folder_that_others_may_write_to_is_refused_and_the_advice_helps(shared, which, permissions):
    (shared / "a" / "b").mkdir(parents=True)
    (shared / "a").chmod(0o755)
    (shared / which).chmod(permissions)
    with pytest.raises(UserError) as error:
        trusted_folder(shared / "a" / "b", "X")
    assert str(error.value) == (
        f"other users may write to {shared / which} (X): run chmod go-w on it if you trust what it holds"
    )
    (shared / which).chmod(permissions & ~0o022)
    trusted_folder(shared / "a" / "b", "X")


def test_a_folder_that_is_shared_itself_is_refused(shared):
    with pytest.raises(UserError, match=r"other users may write to .*shared \(X\)"):
        trusted_folder(shared, "X")


@pytest.mark.parametrize("permissions", [0o755, 0o777])
def test_a_folder_of_another_user_is_refused(shared, permissions, monkeypatch):
    folder = shared / "theirs"
    folder.mkdir()
    folder.chmod(permissions)
    if os.geteuid() == 0:
        os.chown(folder, 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    message = r"theirs \(X\) belongs to another user, .*: remove it, or set X to a folder of your own"
    with pytest.raises(UserError, match=message):
        trusted_folder(folder / "below", "X")
    assert not (folder / "below").exists()


def test_a_link_counts_for_what_it_leads_to(shared, tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (shared / "link").symlink_to(tmp_path / "open")
    with pytest.raises(UserError, match=r"other users may write to .*open \(X\)"):
        trusted_folder(shared / "link", "X")
    (tmp_path / "open").chmod(0o700)
    trusted_folder(shared / "link" / "new", "X")
    assert (tmp_path / "open" / "new").is_dir()


@pytest.mark.parametrize("name", VARIABLES)
def test_compiled_code(shared, name):
    environment = {variable: str(shared / "code" / variable) for variable in VARIABLES}
    trust_compiled_code(environment)
    assert [mode(shared / "code" / variable) for variable in VARIABLES] == [0o700] * 3
    (shared / "code" / name).chmod(0o777)
    with pytest.raises(UserError, match=f"other users may write to .* .{name}."):
        trust_compiled_code(environment)


def test_compiled_code_where_inductor_keeps_it_by_default(shared, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(shared))
    monkeypatch.setenv("LOGNAME", "me")
    trust_compiled_code({})
    assert mode(shared / "torchinductor_me") == 0o700
    (shared / "torchinductor_me").chmod(0o777)
    with pytest.raises(UserError, match="torchinductor_me .TORCHINDUCTOR_CACHE_DIR."):
        trust_compiled_code({})
    trust_compiled_code({"TORCHINDUCTOR_CACHE_DIR": str(shared / "own")})


def test_a_folder_that_cannot_be_made_is_named(shared):
    (shared / "file").touch(0o600)
    with pytest.raises(UserError, match="cannot be used for compiled code .Not a directory.: set TRITON_CACHE_DIR to"):
        trust_compiled_code({"TRITON_CACHE_DIR": str(shared / "file" / "x")})


def test_training_refuses_before_it_begins(shared, monkeypatch, capfd, tmp_path):
    (shared / "code").mkdir()
    (shared / "code").chmod(0o777)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(shared / "code"))
    monkeypatch.delenv("RANK", raising=False)
    assert main(["train", "quickstart", "--out", str(tmp_path / "run")]) == 2
    assert f"other users may write to {shared}/code (TRITON_CACHE_DIR): run chmod go-w" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_cache_of_shards(shared):
    storage = {"urls": ["http://127.0.0.1:1/a.tar"], "sizes": [1]}
    ShardStorage(**storage, cache_dir=shared / "cache")
    assert mode(shared / "cache") == 0o700
    (shared / "cache").chmod(0o777)
    with pytest.raises(UserError, match=r"other users may write to .*cache \(data.cache\)"):
        ShardStorage(**storage, cache_dir=shared / "cache")
