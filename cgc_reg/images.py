"""Images as their viewer shows them: whatever their mode, depth and orientation."""

from __future__ import annotations

import os
import struct

from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import functional as TF

MOST_ELONGATED = 1000  # a side over the other; resizing such an image by its shorter side takes 200 MB at 256 pixels
_GREY = ("1", "L", "LA", "La")
_WITH_ALPHA = ("LA", "La", "P", "PA", "RGBA", "RGBa")  # a palette may hold transparent colours
_STRAIGHT = {"La": "LA", "RGBa": "RGBA"}  # from colours that are multiplied by alpha
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # of TIFF
# What Pillow's readers raise on damaged files: what `Image.open` itself expects of them, and what their decoders add.
_EXPECTED = (SyntaxError, IndexError, TypeError, struct.error)
_DAMAGED = (*_EXPECTED, OSError, EOFError, ValueError, RuntimeError, Image.DecompressionBombError)


class ImageError(ValueError):
    """An image file that cannot be read, and why."""


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file as its viewer shows it, in mode RGB.

    Pixels are those of `as_shown`. Of several frames or pages it is the first.

    Args:
        path: of any file that Pillow reads.

    Returns:
        The image, read to its end.

    Raises:
        ImageError: the file is missing, damaged or no image; its pixels have no range that says what is white; or one
            side is more than 1000 times the other, so that resizing would make it huge.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("I;16", (4, 2), 257).save(f"{folder}/dark.png")
        ...     open_image(f"{folder}/dark.png").getpixel((0, 0))
        (1, 1, 1)
    """
    try:
        return _read(path)
    except _DAMAGED as error:
        raise ImageError(f"the image {path} cannot be read ({_reason(error)}); repair or remove it.") from None


def fault(path: str | os.PathLike[str]) -> str | None:
    """Say why `open_image` cannot read a file; None if it can.

    Args:
        path: of the file, which is read to its end: nothing less finds one that breaks off.

    Example:
        >>> fault("missing.png")
        'No such file or directory'
    """
    try:
        _read(path)
    except _DAMAGED as error:
        return _reason(error)
    return None


def as_shown(image: Image.Image) -> Image.Image:
    """Return an image in mode L or RGB, with the pixels that a viewer shows.

    torchvision's functions read these two modes rightly. Of the others they take the numbers as they are, or clip them:

    - grey of 16 bits, v from 0 to 65535, becomes round(v / 257), so that white stays white and order stays order.
      Pillow's mode I counts as 16 bits. Darker data, such as 12 bits in files of 16, stay as dark as a viewer shows
      them: stretch them before;
    - floats from 0 to 1 become round(255 v);
    - palettes are looked up; 1 bit, CMYK, YCbCr, LAB and HSV are converted;
    - what is transparent shows white;
    - the EXIF orientation is applied.

    Colour profiles are not applied. Pillow reads colours of 16 bits as their upper 8 bits by itself.

    Args:
        image: in any mode; of several frames the one it stands at, after opening the first.

    Returns:
        A new image: L if ``image`` is grey, and RGB otherwise.

    Raises:
        ValueError: the pixels lie outside the range above, so that nothing says what is white.

    Example:
        >>> as_shown(Image.new("I;16", (4, 2), 65535)).getpixel((0, 0))
        255
        >>> as_shown(Image.new("RGBA", (4, 2), (0, 0, 0, 0))).getpixel((0, 0))
        (255, 255, 255)
    """
    deep = _deep_grey(image)
    if deep is not None:
        return TF.to_pil_image((255 * deep).round().byte())  # type: ignore[no-any-return]  # torchvision has no types
    image = _turned(image)
    mode = "L" if image.mode in _GREY else "RGB"
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        image = image.convert(_STRAIGHT.get(image.mode, image.mode)).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    shown = image.convert(mode)
    shown.info = {}  # orientation and transparency are applied, and must not be again
    return shown


def pixels(image: Image.Image) -> Tensor:
    """Return an image's pixels as `as_shown` has them, but grey of 16 bits with all of its bits.

    Args:
        image: in any mode.

    Returns:
        (c, h, w), one channel for grey and three otherwise: uint8, or float32 from 0 to 1 if ``image`` is grey of more
        than 8 bits.

    Raises:
        ValueError: as `as_shown`.

    Example:
        >>> pixels(Image.new("I;16", (4, 2), 65535)).unique()
        tensor([1.])
    """
    deep = _deep_grey(image)
    return TF.pil_to_tensor(as_shown(image)) if deep is None else deep


def orientation(image: Image.Image) -> int:
    """Return which turn an image's EXIF data ask for, from 1 (none) to 8; where they are damaged, 1, as in a viewer.

    Args:
        image: in any mode. A TIFF file asks for no turn once its pixels are loaded: Pillow turns those then.

    Example:
        >>> orientation(Image.new("L", (4, 2)))
        1
    """
    try:
        asked = image.getexif().get(ExifTags.Base.Orientation)
    except _DAMAGED:
        return 1
    return asked if asked in _TURNS else 1


def _read(path: str | os.PathLike[str]) -> Image.Image:
    with Image.open(path) as image:
        if max(image.size) > MOST_ELONGATED * min(image.size):
            raise ValueError(f"it is {image.width} x {image.height} pixels, which resizing would make huge")
        return as_shown(image).convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no image that Pillow knows"
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(words.split()).removesuffix(".")


def _deep_grey(image: Image.Image) -> Tensor | None:
    """Return grey pixels of more than 8 bits as (1, h, w), from 0 to 1; None if the image has others."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return None
    tags = getattr(image, "tag_v2", {})  # of a TIFF file
    turned = _turned(image)
    if image.mode == "F":
        values, white = TF.pil_to_tensor(turned), 1
    else:
        values, white = TF.pil_to_tensor(turned.convert("I")), 4095 if tags.get(_BITS_PER_SAMPLE) == (12,) else 65535
    low, high = values.min().item(), values.max().item()
    if not 0 <= low <= high <= white:  # NaN neither
        raise ValueError(
            f"`image` must hold pixels from 0 to {white}, since its mode is {image.mode}; got {low:g} to {high:g}. "
            "Scale them to that, or save 8 bits."
        )
    shares: Tensor = values.float() / white
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # which Pillow heeds for 8 bits alone
        shares = 1 - shares
    if "transparency" in image.info:
        shares[values == image.info["transparency"]] = 1
    return shares


def _turned(image: Image.Image) -> Image.Image:
    image.load()  # turns a TIFF file by itself
    asked = orientation(image)
    return image if asked == 1 else image.transpose(_TURNS[asked])
