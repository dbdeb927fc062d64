"""What a tar of our own holds comes out; whatever would be written elsewhere is refused."""

import io
import tarfile

import pytest

from fastvit_engine.unpack import unpack


def _packed(*members):
    """members: (name, type, content)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(content), "/etc/passwd"
            archive.addfile(member, io.BytesIO(content))
    file.seek(0)
    return tarfile.open(fileobj=file)


def test_files_and_folders_come_out(tmp_path):
    members = [("empty", tarfile.DIRTYPE, b""), ("a/b.txt", tarfile.REGTYPE, b"one"), ("c", tarfile.REGTYPE, b"")]
    unpack(_packed(*members), tmp_path)
    found = {str(path.relative_to(tmp_path)): path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    assert found == {"empty": False, "a": False, "a/b.txt": b"one", "c": b""}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../out", tarfile.REGTYPE),
        ("a/../../out", tarfile.REGTYPE),
        ("/tmp/out", tarfile.REGTYPE),
        ("link", tarfile.SYMTYPE),
        ("link", tarfile.LNKTYPE),
        ("device", tarfile.CHRTYPE),
    ],
)
def test_what_leads_out_is_refused(tmp_path, name, kind):
    with pytest.raises(ValueError, match="no plain file or folder below its own"):
        unpack(_packed((name, kind, b"")), tmp_path / "inner")
    assert not list(tmp_path.rglob("*"))
