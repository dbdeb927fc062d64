"""Which file names are taken for images."""

from PIL import Image

# Formats of photos that Pillow opens. Icons, textures, vector graphics, documents, video and scientific data are none.
_FORMATS = frozenset(
    "AVIF BMP DIB GIF JPEG JPEG2000 MPO PCD PCX PNG PPM QOI SGI SUN TGA TIFF WEBP".split()  # noqa: SIM905
)
_NO_PHOTOS = frozenset({".pfm"})  # floating-point pixels, of depth maps
_FIRST = (".jpg", ".jpeg", ".png", ".webp")

# Lower-case suffixes, the usual ones first: a sample that has images in several formats is read from the first.
IMAGE_SUFFIXES: tuple[str, ...] = (
    *_FIRST,
    *sorted(
        suffix
        for suffix, format in Image.registered_extensions().items()
        if format in _FORMATS and suffix not in _NO_PHOTOS and suffix not in _FIRST
    ),
)


def has_image_suffix(name: str) -> bool:
    """Whether a file name, in any case, ends like that of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)
