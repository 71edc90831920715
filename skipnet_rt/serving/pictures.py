"""From the bytes of strangers to a picture, without unpacking what is too large."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What a server reads: plain raster formats. Others of Pillow's start programs (EPS) or are hardly ever pictures."""


class PictureError(ValueError):
    """A picture that cannot be read, or is too large; the message is one line.

    Attributes:
        too_large: whether it is that.
    """

    def __init__(self, message: str, *, too_large: bool = False) -> None:
        super().__init__(message)
        self.too_large = too_large


def decoded(data: bytes, max_pixels: int | None = None) -> Image.Image:
    """A picture file's first frame, unpacked.

    Args:
        data: the file.
        max_pixels: refuse larger ones, before they are unpacked, and files in formats other than :data:`FORMATS`;
            None: any that Pillow reads, as the files of one's own.

    Raises:
        PictureError: it is none, is damaged or is too large.
    """
    try:
        picture = Image.open(BytesIO(data), formats=None if max_pixels is None else FORMATS)
        if max_pixels is None or picture.width * picture.height <= max_pixels:
            picture.load()
            return picture
    except Image.DecompressionBombError as error:
        raise PictureError(str(error), too_large=True) from None
    except UnidentifiedImageError:  # its message holds an address in memory
        raise PictureError("not a picture that can be read (of no known format)") from None
    except Exception as error:  # what a damaged picture raises depends on its format
        raise PictureError(f"not a picture that can be read ({error})") from None
    raise PictureError(f"a picture may have up to {max_pixels} pixels, this one has {picture.width}x{picture.height}",
                       too_large=True)


def from_array(pixels: np.ndarray) -> Image.Image:
    """Pixels as a picture: uint8 ``[H, W]`` (grey), ``[H, W, 3]`` (RGB) or ``[H, W, 4]`` (RGB and alpha).

    Raises:
        PictureError: they are not as described.
    """
    shape = pixels.shape
    if pixels.dtype != np.uint8 or 0 in shape or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4))):
        raise PictureError(f"an array must be uint8 of shape [H, W], [H, W, 3] or [H, W, 4], "
                           f"got {pixels.dtype} {list(shape)}")
    return Image.fromarray(pixels)
