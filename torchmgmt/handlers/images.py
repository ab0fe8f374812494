"""Pictures as tensors: reading what a request sent, and the usual steps before a network, on Pillow and torch alone.

The steps and their names are torchvision's, and so are the numbers: on a picture its bilinear resizing is Pillow's, too,
which widens the filter when it scales down (``antialias``).
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import Tensor

from torchmgmt.handlers.inputs import InputRefused
from torchmgmt.handlers.options import Options

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["FORMATS", "INTERPOLATIONS", "MAX_PIXELS", "ImagePreset", "allow_pixels", "read_image"]

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is read. Pillow knows more, some of it by starting other programs."""

MAX_PIXELS = 89_478_485
"""A quarter of a GiB of red, green and blue: where Pillow begins to warn."""

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
MODES = ("RGB", "L")


def read_image(data: bytes | bytearray | memoryview, *, max_pixels: int | None, upright: bool = False) -> Image.Image:
    """Return the picture in ``data``, decoded; of an animation the first one. Blocks; any thread.

    Args:
        data: a file in one of :data:`FORMATS`.
        max_pixels: the most pixels that a picture may have; None: any number. Only its head is looked at for this.
        upright: turn it as its EXIF orientation says.

    Raises:
        InputRefused: 413 for a picture that is too large, 400 for anything that is none or is broken.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(image.size, max_pixels)
        image.load()
        return ImageOps.exif_transpose(image) if upright else image
    except (InputRefused, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputRefused(f"the picture is too large: {error}", error_code=413) from error
    except UnidentifiedImageError as error:
        raise InputRefused(
            f"the data ({len(data)} bytes) is no picture that can be read; known are: {', '.join(FORMATS)}"
        ) from error
    except Exception as error:  # whatever its decoders raise: OSError, SyntaxError, ValueError, struct.error, ...
        raise InputRefused(f"the picture is broken: {error}") from error


def allow_pixels(count: int | None) -> None:
    """Let Pillow decode pictures of up to ``count`` pixels in this process; None: of any size. It never allows less."""
    from PIL import Image

    if count is None:
        Image.MAX_IMAGE_PIXELS = None
    elif Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, count)


def _check_size(size: tuple[int, int], max_pixels: int | None) -> None:
    if max_pixels is not None and size[0] * size[1] > max_pixels:
        raise InputRefused(
            f"the picture is too large: {size[0]} x {size[1]} pixels, and at most {max_pixels} pixels are allowed"
            " (handler.max_image_pixels in model-config.yaml)",
            error_code=413,
        )


@frozen
class ImagePreset:
    """Makes a float tensor [channels, height, width] of a picture: resize, crop, scale to 0..1, normalise.

    Args:
        resize_size: pixels of the shorter side after resizing, the other in proportion; None: as it is.
        crop_size: pixels of the square cut from the middle, black where the picture is smaller; None: all of it.
        mean: subtracted from each channel; None: nothing is. One for all channels, or one for each.
        std: what each channel is divided by then; None: 1.
        interpolation: one of :data:`INTERPOLATIONS`.
        image_mode: what a picture is made before all else: ``RGB``, or ``L`` for one channel of grey.
    """

    resize_size: int | None = 256
    crop_size: int | None = 224
    mean: tuple[float, ...] | None = (0.485, 0.456, 0.406)
    std: tuple[float, ...] | None = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"
    image_mode: str = "RGB"

    def changed(self, options: Options) -> ImagePreset:
        """Return the preset that ``options`` ask for, this one being the default. Raises ValueError."""
        mode = options.choice("image_mode", self.image_mode, MODES)
        channels = len(mode)
        preset = ImagePreset(
            options.count_or_none("resize_size", self.resize_size),
            options.count_or_none("crop_size", self.crop_size),
            options.numbers("mean", _fitting(self.mean, channels)),
            options.numbers("std", _fitting(self.std, channels)),
            options.choice("interpolation", self.interpolation, INTERPOLATIONS),
            mode,
        )
        for name, values in (("mean", preset.mean), ("std", preset.std)):
            if values is not None and len(values) not in {1, channels}:
                raise ValueError(
                    f"handler.{name} in model-config.yaml has {len(values)} numbers, but a picture of mode {mode} has"
                    f" {channels} channel{'s' if channels > 1 else ''}"
                )
        if preset.std is not None and 0 in preset.std:
            raise ValueError("handler.std in model-config.yaml must not hold 0: it is divided by")
        return preset

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the tensor. Raises InputRefused for a shape that cannot be resized."""
        image = _in_mode(image, self.image_mode)
        if self.resize_size is not None:
            image = self._resized(image, self.resize_size)
        if self.crop_size is not None:
            image = _center_cropped(image, self.crop_size)
        return self._normalised(_to_tensor(image))

    def _resized(self, image: Image.Image, size: int) -> Image.Image:
        from PIL import Image

        short, long = sorted(image.size)
        other = int(size * long / short)
        wanted = (size, other) if image.width <= image.height else (other, size)
        if wanted == image.size:
            return image
        # A line of 1 x 60,000 pixels would be 4 billion.
        if size * other > max(MAX_PIXELS, image.width * image.height):
            raise InputRefused(
                f"the picture is too narrow: {image.width} x {image.height} pixels would be {wanted[0]} x {wanted[1]} at"
                " the size that the model needs"
            )
        return image.resize(wanted, Image.Resampling[self.interpolation.upper()])

    def _normalised(self, pixels: Tensor) -> Tensor:
        if self.mean is not None:
            pixels = pixels - _per_channel(self.mean)
        return pixels if self.std is None else pixels / _per_channel(self.std)


def _fitting(values: tuple[float, ...] | None, channels: int) -> tuple[float, ...] | None:
    """A default for colours, for a picture that has none: their mean."""
    if values is None or len(values) in {1, channels}:
        return values
    return (sum(values) / len(values),)


def _per_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values)[:, None, None]


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode:
        return image
    if image.mode.startswith("I"):  # 16 bits of grey, of which Pillow by itself would cut off all above 255
        high: Any = image.point(lambda value: value * (1 / 256))
        image = high.convert("L")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


def _center_cropped(image: Image.Image, size: int) -> Image.Image:
    left, top = _offset(image.width, size), _offset(image.height, size)
    return image.crop((left, top, left + size, top + size))


def _offset(length: int, size: int) -> int:
    """Where the middle begins, rounded as torchvision does: to even where it cuts, towards the beginning where it pads."""
    return round((length - size) / 2) if length >= size else -((size - length) // 2)


def _to_tensor(image: Image.Image) -> Tensor:
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = data.view(image.height, image.width, len(image.getbands()))
    return pixels.permute(2, 0, 1).contiguous().float().div(255)
