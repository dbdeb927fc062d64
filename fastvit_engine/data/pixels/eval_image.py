"""An image as evaluation shows it to a model, by itself."""

import numpy as np

from fastvit_engine.config import Config
from fastvit_engine.config.packing import check_squares
from fastvit_engine.data.pixels.crops import eval_view, render
from fastvit_engine.data.pixels.decode import PixelBuffer, open_image
from fastvit_engine.data.pixels.views import decode_views


def eval_image(content: bytes, config: Config) -> np.ndarray:
    """uint8 [S, S, 3] from the bytes of an image file. Raises ValueError if it cannot be decoded.

    Raises UserError if section packing is on: images are seen by themselves here, as squares.
    """
    check_squares(config)
    size = config.model.image_size
    image = open_image(content, config.data.max_pixels)
    view = eval_view(image.height, image.width, size, config.data.eval_crop, config.data.eval_transform)
    decoded = decode_views(image, [view], PixelBuffer())
    out = np.empty((size, size, 3), np.uint8)
    render(decoded, view, out, PixelBuffer())
    return out
