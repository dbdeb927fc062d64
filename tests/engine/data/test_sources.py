import sys

import numpy as np
import pytest

from fastvit_engine.data.decode import decode_image
from fastvit_engine.data.sources import digits, image_folder, open_source
from fastvit_engine.errors import UserError


def test_digits_are_lossless():
    sklearn = pytest.importorskip("sklearn.datasets")
    scans, labels = sklearn.load_digits(return_X_y=True)
    source = open_source("digits")
    assert source.classes == list("0123456789") and len(source.images) == 1797
    assert [image.label for image in source.images] == labels.tolist()
    assert len({image.key for image in source.images}) == 1797
    for index in (0, 5, 1796):
        pixels = decode_image(source.images[index].read())
        expected = np.rint(scans[index].reshape(8, 8) * 255 / 16)
        assert pixels.shape == (8, 8, 3) and all(np.array_equal(pixels[..., c], expected) for c in range(3))


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        digits()


def test_image_folder(tmp_path, photo):
    for name in ("dog/b.JPG", "dog/deep/a.x.jpeg", "cat/z.jpg", "cat/a.jpg", "cat/notes.txt", ".git/x.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(len(name)))
    source = image_folder(tmp_path)
    assert source.classes == ["cat", "dog"]
    assert [(image.key, image.extension, image.label) for image in source.images] == [
        ("00000000_a", "jpg", 0),
        ("00000001_z", "jpg", 0),
        ("00000002_b", "jpg", 1),
        ("00000003_a_x", "jpeg", 1),
    ]
    assert source.images[0].read() == photo(len("cat/a.jpg"))


def test_folders_that_cannot_serve(tmp_path, photo):
    with pytest.raises(UserError, match="no folder"):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no sub-folders"):
        image_folder(tmp_path)
    (tmp_path / "flat.jpg").write_bytes(photo(0))
    with pytest.raises(UserError, match="has no sub-folders"):
        image_folder(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(UserError, match=r"class folder .*cat holds no image"):
        image_folder(tmp_path)


def test_truncated_image_is_refused(tmp_path, photo):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "half.jpg").write_bytes(photo(0, 300, 400)[:-2000])
    with pytest.raises(UserError, match=r"image .*half\.jpg cannot be read"):
        image_folder(tmp_path).images[0].read()
