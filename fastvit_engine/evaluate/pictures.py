"""Images as text, for the records that a report shows."""

import base64
import io

from PIL import Image
from torch import Tensor


def png_url(image: Tensor) -> str:
    """A uint8 image [H, W, 3] as a data URL."""
    buffer = io.BytesIO()
    Image.fromarray(image.cpu().numpy()).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
