"""Pictures become the tensors that torchvision's steps make of them; what cannot be one is refused with a 4xx."""

from __future__ import annotations

import struct
import warnings
from typing import Any

import pytest
import torch
from PIL import Image

from tests.pictures import encoded, picture, png_head
from tests.unit.shipped import one_thread
from torchmgmt.handlers.images import FORMATS, ImagePreset, allow_pixels, read_image
from torchmgmt.handlers.inputs import InputRefused
from torchmgmt.handlers.options import Options

__all__ = ["one_thread"]

PLAIN = ImagePreset(None, None, None, None)

# Width, height, Resize, CenterCrop -> the red channel that torchvision 0.29.2 makes of `picture(width, height)`.
TORCHVISION = [
    (7, 5, 4, 3, [[52, 97, 142], [72, 117, 162], [92, 137, 182]]),
    (5, 9, 3, 2, [[81, 130], [113, 162]]),
    (
        *(3, 4, 6, 5),
        [
            *([13, 21, 36, 52, 67], [21, 29, 44, 60, 75], [30, 38, 53, 69, 84]),
            *([38, 46, 61, 77, 92], [47, 55, 70, 86, 101]),
        ],
    ),
]


def read(data: bytes, max_pixels: int | None = 10_000_000, **options: Any) -> Image.Image:
    return read_image(data, max_pixels=max_pixels, **options)


@pytest.mark.parametrize("width, height, size, crop, red", TORCHVISION)
def test_resizing_and_cropping_are_those_of_torchvision(
    width: int, height: int, size: int, crop: int, red: list[list[int]]
) -> None:
    """To the bit: shorter side, antialiased bilinear, the middle rounded to even."""
    tensor = ImagePreset(size, crop, None, None)(picture(width, height))
    assert torch.equal(tensor[0], torch.tensor(red) / 255)


def test_a_picture_smaller_than_the_crop_is_padded_with_black() -> None:
    """As torchvision does: the odd pixel goes to the right and the bottom."""
    tensor = ImagePreset(None, 7, None, None)(picture(4, 3))
    assert tensor.shape == (3, 7, 7)
    assert torch.equal(tensor[:, 2:5, 1:5], PLAIN(picture(4, 3)))
    assert tensor.count_nonzero() == PLAIN(picture(4, 3)).count_nonzero()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_scaling_down_is_antialiased(interpolation: str) -> None:
    """It agrees with torch's own antialiased interpolation to the rounding of 8 bits."""
    image = picture(90, 70)
    wanted = torch.nn.functional.interpolate(
        PLAIN(image)[None], size=(20, 25), mode=interpolation, antialias=True, align_corners=False
    )
    tensor = ImagePreset(20, None, None, None, interpolation)(image)
    assert tensor.shape == (3, 20, 25)
    assert (tensor - wanted[0].clamp(0, 1)).abs().max() <= 1.5 / 255


def test_mean_and_deviation_are_applied_to_each_channel() -> None:
    """(value - mean) / std, in this order."""
    image = picture(3, 2)
    tensor = ImagePreset(None, None, (0.1, 0.2, 0.3), (0.5, 0.25, 2.0))(image)
    for channel, (mean, std) in enumerate(((0.1, 0.5), (0.2, 0.25), (0.3, 2.0))):
        assert torch.allclose(tensor[channel], (PLAIN(image)[channel] - mean) / std)


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
def test_each_format_is_read(kind: str) -> None:
    """Every format that is said to be read is, and the several JPEG pictures in one that some cameras write."""
    options = {"save_all": True} if kind == "MPO" else {}
    image = read(encoded(picture(20, 10), kind, **options))
    assert image.size == (20, 10)
    assert PLAIN(image).shape == (3, 10, 20)


@pytest.mark.parametrize("mode, kind", [("L", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("L", "JPEG")])
@pytest.mark.parametrize("wanted, channels", [("RGB", 3), ("L", 1)])
def test_a_picture_of_any_mode_has_the_channels_of_the_model(mode: str, kind: str, wanted: str, channels: int) -> None:
    """Grey, transparent, palette and print pictures work where a photograph does."""
    image = read(encoded(picture(8, 6, mode), kind))
    tensor = ImagePreset(4, 4, (0.5,), (0.5,), image_mode=wanted)(image)
    assert tensor.shape == (channels, 4, 4)
    assert tensor.isfinite().all()


def test_a_palette_with_transparency_gives_no_warning() -> None:
    """It is made RGBA before RGB, as Pillow asks for."""
    image = read(encoded(picture(4, 4, "P"), transparency=b"\0\x80"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PLAIN(image).shape == (3, 4, 4)


def test_sixteen_bits_of_grey_keep_their_upper_eight() -> None:
    """Pillow by itself makes white of all above 255."""
    values = [0, 255, 256, 32768, 65280, 65535]
    image = Image.frombytes("I;16", (6, 1), struct.pack("<6H", *values))
    tensor = PLAIN(read(encoded(image)))
    assert (tensor[0, 0] * 255).round().int().tolist() == [value // 256 for value in values]


def test_orientation_is_used_only_where_it_is_asked_for() -> None:
    """As torchvision's decoder, which leaves pictures as they are stored unless told otherwise."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    data = encoded(picture(8, 4), "JPEG", exif=exif)
    assert read(data).size == (8, 4)
    assert read(data, upright=True).size == (4, 8)


@pytest.mark.parametrize("upright", [False, True])
def test_a_picture_without_orientation_is_as_it_is(upright: bool) -> None:
    """Asking for the orientation changes nothing where there is none."""
    assert PLAIN(read(encoded(picture(5, 4)), upright=upright)).equal(PLAIN(picture(5, 4)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no picture",
        b"\xff\xd8\xff",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        encoded(picture(90, 90))[:60],
        b"\x89PNG\r\n\x1a\n",
    ],
    ids=["nothing", "noise", "JPEG head", "PostScript", "cut off", "PNG head"],
)
def test_what_is_no_picture_is_a_400(data: bytes) -> None:
    """Noise, cut-off files and PostScript, which Pillow would start a program for."""
    with pytest.raises(InputRefused, match="picture") as raised:
        read(data)
    assert raised.value.error_code == 400


@pytest.mark.parametrize("size", [(40_000, 40_000), (4_000, 3_000)])
def test_a_picture_of_too_many_pixels_is_a_413_by_its_head(size: tuple[int, int]) -> None:
    """Nothing of it is decoded; also where Pillow's own bound, higher than ours, finds it first."""
    with pytest.raises(InputRefused, match="too large") as raised:
        read(png_head(*size))
    assert raised.value.error_code == 413


def test_a_bound_above_that_of_pillow_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's is raised with ours, and not lowered."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(InputRefused, match="too large"):
        read(encoded(picture(20, 10)))
    allow_pixels(300)
    assert read(encoded(picture(20, 10))).size == (20, 10)
    allow_pixels(10)
    assert Image.MAX_IMAGE_PIXELS == 300
    allow_pixels(None)
    assert read(encoded(picture(90, 90)), max_pixels=None).size == (90, 90)


def test_a_line_that_resizing_would_make_a_bomb_is_refused() -> None:
    """1 x 60,000 pixels are few, 256 x 15,360,000 are not."""
    with pytest.raises(InputRefused, match="60000") as raised:
        ImagePreset()(Image.new("RGB", (1, 60_000)))
    assert raised.value.error_code == 400


@pytest.mark.parametrize(
    "section, what",
    [
        ({"resize_size": 0}, "resize_size"),
        ({"crop_size": "224"}, "crop_size"),
        ({"mean": []}, "mean"),
        ({"mean": [0.5, 0.5]}, "mean"),
        ({"std": [0.0, 1, 1]}, "std"),
        ({"std": ["a"]}, "std"),
        ({"mean": [float("nan")]}, "mean"),
        ({"interpolation": "linear"}, "bilinear"),
        ({"image_mode": "RGBA"}, "RGB, L"),
    ],
)
def test_a_wrong_option_is_named(section: dict[str, Any], what: str) -> None:
    """With its key, or what is allowed instead."""
    with pytest.raises(ValueError, match=what):
        ImagePreset().changed(Options(section))


def test_options_replace_what_they_name() -> None:
    """All else stays; a grey picture is normalised with the mean of the three colours unless told otherwise."""
    preset = ImagePreset().changed(Options({"resize_size": None, "crop_size": 8, "mean": [0.5]}))
    assert preset == ImagePreset(None, 8, (0.5,))
    grey = ImagePreset().changed(Options({"image_mode": "L"}))
    assert grey.mean == pytest.approx((0.449,))
    assert grey.std == pytest.approx((0.226,))
