"""Image files of every kind are read as a viewer shows them, left out with a word, or refused by name."""

import colorsys
import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, features
from torchvision.datasets import ImageFolder

from cgc_reg import ContrastiveTransforms
from cgc_reg.folders import check_images, find_images, image_folder
from cgc_reg.images import as_shown, fault, open_image
from tests.tiny import write_images

AVIF = pytest.param("avif", marks=pytest.mark.skipif("avif" not in features.modules, reason="an older Pillow"))
EVERY_16_BITS = np.arange(65536, dtype=np.uint16).reshape(256, 256)
NOISE = np.random.default_rng(0).integers(256, size=(5, 7, 4), dtype=np.uint8)


def as_array(image):
    return np.asarray(image).astype(int)


def read(path):
    """The pixels (h, w, 3) of a file."""
    image = open_image(path)
    assert image.mode == "RGB"
    return as_array(image)


def write_tiff(path, values, *, bits, photometric=1):
    """Write grey pixels as the simplest TIFF file there is: one strip, not compressed."""
    height, width = values.shape
    if bits == 12:  # two pixels in three bytes
        a, b = values[:, ::2].astype(int), values[:, 1::2].astype(int)
        strip = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], axis=-1).astype(np.uint8).tobytes()
    else:
        strip = values.astype(f"<u{bits // 8}").tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(strip)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = b"II*\0" + struct.pack("<I", 8 + len(strip))
    path.write_bytes(header + strip + struct.pack("<H", len(tags)) + entries + bytes(4))


def write_png_of_16_bits(path, values):
    """Write colours of 16 bits, (h, w, 3), which Pillow cannot write."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


# ---- depth


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "grey.pgm", "grey.jp2"])
def test_16_bits_become_the_nearest_of_8(tmp_path, name):
    Image.fromarray(EVERY_16_BITS).save(tmp_path / name)
    expected = np.rint(EVERY_16_BITS / 257).astype(int)  # 65535 / 255; no value lies between two
    assert np.array_equal(read(tmp_path / name), expected[..., None].repeat(3, axis=2))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I"])
def test_16_bits_are_16_bits_in_every_mode(mode):
    image = Image.fromarray(EVERY_16_BITS).convert("I")
    shown = as_shown(image if mode == "I" else image.convert(mode))
    assert shown.mode == "L"
    assert np.array_equal(as_array(shown), np.rint(EVERY_16_BITS / 257))


def test_contrastive_transforms_keep_all_16_bits():
    image, _, _ = ContrastiveTransforms()(Image.fromarray(EVERY_16_BITS))
    assert torch.equal(image[0], torch.from_numpy(EVERY_16_BITS.astype(np.float32)) / 65535)


@pytest.mark.parametrize("image_transform", [lambda image: image, lambda image: image.convert("RGB")])
def test_contrastive_transforms_give_their_image_transform_8_bits(image_transform):
    image, _, _ = ContrastiveTransforms(image_transform)(Image.fromarray(EVERY_16_BITS))
    expected = torch.from_numpy(np.rint(EVERY_16_BITS / 257).astype(np.float32)) / 255
    for channel in image:
        torch.testing.assert_close(channel, expected, rtol=1e-6, atol=0)


def test_12_bits_of_a_tiff_file_go_to_its_own_white(tmp_path):
    values = np.arange(4096).reshape(64, 64)
    write_tiff(tmp_path / "grey.tif", values, bits=12)
    # 4095 / 255 is 16.06, and no value lies between two
    assert np.array_equal(read(tmp_path / "grey.tif")[..., 0], np.rint(values * 255 / 4095))


@pytest.mark.parametrize(("bits", "white"), [(8, 255), (16, 65535)])
def test_a_tiff_file_whose_white_is_zero_is_turned_round(tmp_path, bits, white):
    values = np.arange(0, white + 1, white // 255).reshape(16, 16)
    write_tiff(tmp_path / "grey.tif", values, bits=bits, photometric=0)
    assert np.array_equal(read(tmp_path / "grey.tif")[..., 0], 255 - np.arange(256).reshape(16, 16))


def test_colours_of_16_bits_are_read_by_their_upper_8(tmp_path):
    values = np.random.default_rng(0).integers(65536, size=(5, 7, 3))
    write_png_of_16_bits(tmp_path / "colours.png", values)
    assert np.array_equal(read(tmp_path / "colours.png"), values >> 8)


def test_floats_from_0_to_1_are_shares_of_white(tmp_path):
    values = np.linspace(0, 1, 35, dtype=np.float32).reshape(5, 7)
    Image.fromarray(values).save(tmp_path / "grey.tif")
    assert np.array_equal(read(tmp_path / "grey.tif")[..., 0], np.rint(255 * values))


@pytest.mark.parametrize(
    "values",
    [
        np.full((5, 7), 1.5, np.float32),
        np.full((5, 7), np.nan, np.float32),
        np.full((5, 7), 65536, np.int32),
        np.full((5, 7), -1, np.int32),
    ],
)
def test_pixels_without_a_known_white_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "measured.tif")
    with pytest.raises(
        ValueError, match=r"^the image .*measured.tif cannot be read \(`image` must hold pixels from 0 to"
    ):
        open_image(tmp_path / "measured.tif")
    assert fault(tmp_path / "measured.tif").endswith("or save 8 bits")
    with pytest.raises(ValueError, match=r"^`image` must hold pixels from 0 to \d+, since its mode is [IF]; got "):
        ContrastiveTransforms()(Image.fromarray(values))


# ---- modes, palettes, transparency


def on_white(colours, alpha):
    return colours * (alpha / 255) + 255 * (1 - alpha / 255)


def cmyk_colours(image):
    return (255 - image[..., :3]) * (255 - image[..., 3:]) / 255


def ycbcr_colours(image):
    """As ITU-T T.871 (JFIF) has it, section 7."""
    y, cb, cr = np.moveaxis(image - np.array([0, 128, 128]), -1, 0)
    return np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=-1).clip(0, 255)


def hsv_colours(image):
    return np.array([[colorsys.hsv_to_rgb(*pixel / 255) for pixel in row] for row in image]) * 255


COLOURS, ALPHA = NOISE[..., :3].astype(int), NOISE[..., 3:].astype(int)
GREY = COLOURS[..., :1].repeat(3, axis=2)
MODES = {
    "1": (Image.fromarray(NOISE[..., 0] > 99), 255 * (GREY > 99)),
    "L": (Image.fromarray(NOISE[..., 0]), GREY),
    "LA": (Image.frombytes("LA", (7, 5), NOISE[..., [0, 3]].tobytes()), on_white(GREY, ALPHA)),
    "RGB": (Image.fromarray(NOISE[..., :3]), COLOURS),
    "RGBA": (Image.fromarray(NOISE), on_white(COLOURS, ALPHA)),
    "CMYK": (Image.frombytes("CMYK", (7, 5), NOISE.tobytes()), cmyk_colours(NOISE.astype(int))),
    "YCbCr": (Image.frombytes("YCbCr", (7, 5), NOISE[..., :3].tobytes()), ycbcr_colours(COLOURS)),
    "HSV": (Image.frombytes("HSV", (7, 5), NOISE[..., :3].tobytes()), hsv_colours(COLOURS)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_shows_its_colours(mode):
    image, expected = MODES[mode]
    assert image.mode == mode
    before = image.copy()
    shown = as_shown(image)
    assert shown.mode == ("L" if mode in ("1", "L", "LA") else "RGB")
    # Pillow rounds each product; HSV goes through whole sixths of the circle.
    assert np.abs(as_array(shown.convert("RGB")) - expected).max() <= (2 if mode == "HSV" else 1)
    assert as_shown(shown) == shown
    assert image == before
    pixels, _, _ = ContrastiveTransforms()(image)
    assert torch.equal(pixels, torch.from_numpy(np.array(shown)).view(5, 7, -1).permute(2, 0, 1) / 255)


@pytest.mark.parametrize(("mode", "straight"), [("La", "LA"), ("RGBa", "RGBA")])
def test_colours_that_hold_their_alpha_are_the_same(mode, straight):
    image = MODES[straight][0].convert(mode)
    assert as_shown(image) == as_shown(image.convert(straight))


def test_lab_shows_grey_as_grey(tmp_path):
    Image.frombytes("LAB", (2, 1), bytes([0, 0, 0, 255, 0, 0])).save(tmp_path / "lab.tif")
    assert np.abs(read(tmp_path / "lab.tif") - [[[0] * 3, [255] * 3]]).max() <= 1


PALETTE = np.random.default_rng(1).integers(256, size=(256, 3), dtype=np.uint8)


def with_palette():
    image = Image.fromarray(NOISE[..., 0])
    image.putpalette(PALETTE.tobytes())
    assert image.mode == "P"
    return image


@pytest.mark.parametrize("name", ["indexed.png", "indexed.gif", "indexed.tif", "indexed.bmp"])
def test_palettes_are_looked_up(tmp_path, name):
    with_palette().save(tmp_path / name)
    assert np.array_equal(read(tmp_path / name), PALETTE[NOISE[..., 0]])


def test_contrastive_transforms_look_palettes_up():
    image, _, _ = ContrastiveTransforms()(with_palette())
    assert torch.equal(image, torch.from_numpy(PALETTE[NOISE[..., 0]]).permute(2, 0, 1) / 255)


def test_transparent_places_of_a_palette_show_white(tmp_path):
    index = int(NOISE[0, 0, 0])
    with_palette().save(tmp_path / "one.png", transparency=index)
    expected = PALETTE[NOISE[..., 0]].astype(int)
    expected[NOISE[..., 0] == index] = 255
    assert np.array_equal(read(tmp_path / "one.png"), expected)
    alphas = np.random.default_rng(2).integers(256, size=256, dtype=np.uint8)
    with_palette().save(tmp_path / "many.png", transparency=alphas.tobytes())
    expected = on_white(PALETTE[NOISE[..., 0]].astype(int), alphas[NOISE[..., 0]][..., None].astype(int))
    assert np.abs(read(tmp_path / "many.png") - expected).max() <= 1


def test_a_palette_may_hold_alpha_itself():
    image = Image.fromarray(NOISE[..., 0])
    colours = np.concatenate([PALETTE, PALETTE[::-1, :1]], axis=1)
    image.putpalette(colours.tobytes(), "RGBA")
    expected = on_white(PALETTE[NOISE[..., 0]].astype(int), colours[NOISE[..., 0], 3:].astype(int))
    assert np.abs(as_array(as_shown(image)) - expected).max() <= 1


def test_a_palette_with_alpha_beside_it_shows_white_where_it_is_transparent():
    colours, alpha = with_palette(), Image.fromarray(NOISE[..., 3])
    image = Image.merge("PA", (Image.fromarray(NOISE[..., 0]), alpha))
    image.putpalette(colours.getpalette())
    assert image.mode == "PA"
    expected = on_white(PALETTE[NOISE[..., 0]].astype(int), ALPHA)
    assert np.abs(as_array(as_shown(image)) - expected).max() <= 1


@pytest.mark.parametrize(("mode", "key"), [("L", 7), ("RGB", (7, 8, 9)), ("I;16", 7)])
def test_a_transparent_colour_shows_white(tmp_path, mode, key):
    image = Image.new(mode, (2, 1), 0)
    image.putpixel((1, 0), key)
    image.save(tmp_path / "keyed.png", transparency=key)
    assert np.array_equal(read(tmp_path / "keyed.png"), [[[0] * 3, [255] * 3]])


# ---- orientation and frames

AS_STORED = COLOURS.astype(np.uint8)
# What the person saw, from what the file holds: EXIF 2.32, tag 0x0112.
TURNS = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(image, 2).transpose(1, 0, 2),
    8: lambda image: np.rot90(image),
}


def oriented(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("name", ["turned.png", "turned.tif", "turned.webp"])
def test_orientation_is_applied_once(tmp_path, name, orientation):
    options = {"lossless": True} if name.endswith("webp") else {}
    Image.fromarray(AS_STORED).save(tmp_path / name, exif=oriented(orientation), **options)
    expected = TURNS[orientation](AS_STORED)
    assert np.array_equal(read(tmp_path / name), expected)
    with Image.open(tmp_path / name) as image:
        assert np.array_equal(as_array(as_shown(as_shown(image))), expected)
    with Image.open(tmp_path / name) as image:
        held, _, _ = ContrastiveTransforms(lambda image: image.crop((0, 0, 5, 5)))(image)
    assert torch.equal(held, torch.from_numpy(expected[:5, :5].copy()).permute(2, 0, 1) / 255)


def test_orientation_of_16_bits_is_applied(tmp_path):
    values = EVERY_16_BITS[:3, :200] * 100
    Image.fromarray(values).save(tmp_path / "turned.png", exif=oriented(6))
    assert np.array_equal(read(tmp_path / "turned.png")[..., 0], np.rint(np.rot90(values, -1) / 257))


@pytest.mark.filterwarnings("ignore")  # Pillow's own word on it
@pytest.mark.parametrize("exif", [b"x", b"Exif\0\0x", b"Exif\0\0MM\0*", b"Exif\0\0II*\0\xff\xff\xff\x7f"])
def test_damaged_orientation_counts_for_nothing(tmp_path, exif):
    Image.fromarray(AS_STORED).save(tmp_path / "odd.webp", exif=exif, lossless=True)
    assert np.array_equal(read(tmp_path / "odd.webp"), AS_STORED)


@pytest.mark.parametrize("name", ["two.gif", "two.tif", "two.png", "two.webp"])
def test_of_several_frames_the_first_is_read(tmp_path, name):
    first, second = (Image.new("RGB", (4, 2), colour) for colour in ("red", "blue"))
    first.save(tmp_path / name, save_all=True, append_images=[second])
    with Image.open(tmp_path / name) as image:
        assert image.n_frames == 2
    assert np.abs(read(tmp_path / name) - [255, 0, 0]).max() <= 3  # WebP loses a little


# ---- what cannot be read


def damage(folder):
    """Write damaged files, and return their paths."""
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8))
    for name in ("cut.jpg", "cut.png", "cut.tif", "cut.bmp", "cut.gif", "cut.webp", "cut.jp2", "cut.ppm"):
        image.save(folder / name)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("not an image")
    Image.new("L", (1, 1001)).save(folder / "line.png")
    (folder / "nowhere.png").symlink_to(folder / "gone.png")
    return sorted(folder.iterdir())


def test_damaged_files_are_refused_by_name(tmp_path):
    for path in damage(tmp_path):
        with pytest.raises(ValueError, match=r" cannot be read \(.+\); repair or remove it\.$") as refused:
            open_image(path)
        assert str(refused.value).startswith(f"the image {path} ")
        assert len(str(refused.value).splitlines()) == 1
        with pytest.raises(ValueError, match="cannot be read") as checked:
            check_images([path])
        assert str(checked.value) == str(refused.value)


def test_a_check_names_five_and_counts_the_rest(tmp_path):
    paths = damage(tmp_path)
    Image.new("RGB", (4, 2)).save(tmp_path / "good.png")
    with pytest.raises(
        ValueError, match=r"^12 images cannot be read: .* and 7 more; repair or remove them\.$"
    ) as found:
        check_images([tmp_path / "good.png", *paths], threads=3)
    assert [path for path in paths if str(path) in str(found.value)] == paths[:5]
    check_images([tmp_path / "good.png"] * 100, threads=3)


def test_an_image_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)
    with pytest.raises(ValueError, match=r"bomb\.png cannot be read \(Image size \(64 pixels\) exceeds"):
        check_images([tmp_path / "bomb.png"])


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it can do without
@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "gif", "bmp", "webp", "ppm", "jp2", AVIF])
def test_whatever_is_wrong_with_a_file_the_error_names_it(tmp_path, ending):
    image, path, chance = MODES["RGB"][0], tmp_path / f"odd.{ending}", random.Random(0)
    image.save(path, **({"exif": oriented(6)} if ending in ("png", "jpg", "tif", "webp") else {}))
    whole = path.read_bytes()
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged)
        reason = fault(path)
        if reason is not None:
            with pytest.raises(ValueError, match="cannot be read") as refused:
                open_image(path)
            assert str(refused.value) == f"the image {path} cannot be read ({reason}); repair or remove it."


def test_a_reader_that_mends_broken_files_is_heeded(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    image = Image.fromarray(AS_STORED)
    content = io.BytesIO()
    image.save(content, "PNG")
    (tmp_path / "cut.png").write_bytes(content.getvalue()[:-20])
    assert open_image(tmp_path / "cut.png").size == image.size


# ---- folders


@pytest.fixture
def folder(tmp_path):
    """Two classes with two images each, and what people's folders hold besides."""
    root = tmp_path / ".data" / "train"
    for name in ("cat/0.png", "cat/more/1.JPG", "dog/0.gif", "dog/1.tiff", "2.png"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 2), 9).save(path)
    for name in (
        "cat/._0.png",
        "cat/more/.DS_Store",
        "cat/.thumbnails/0.png",
        ".ipynb_checkpoints/0-checkpoint.png",
        "__MACOSX/cat/0.png",
        "dog/notes.txt",
        "dog/phone.heic",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"\0")
    return root


def test_a_folder_is_read_without_what_is_no_image(folder):
    lines = []
    images = image_folder(folder, say=lines.append)
    assert isinstance(images, ImageFolder)
    assert images.classes == ["cat", "dog"]
    assert [(Path(path).relative_to(folder).as_posix(), label) for path, label in images.samples] == [
        ("cat/0.png", 0),
        ("cat/more/1.JPG", 0),
        ("dog/0.gif", 1),
        ("dog/1.tiff", 1),
    ]
    assert lines == [
        f"Left out of {folder}: hidden files (5, such as .ipynb_checkpoints/0-checkpoint.png), "
        "images in no class folder (1, such as 2.png), no images by name (2, such as dog/notes.txt)."
    ]
    assert [image.getpixel((3, 1)) for image, _ in images] == [(9, 9, 9)] * 4


def test_a_plain_folder_is_that_of_torchvision(tmp_path):
    write_images(tmp_path)
    images, own = image_folder(tmp_path / "train"), ImageFolder(tmp_path / "train")
    assert (images.samples, images.classes, images.targets) == (own.samples, own.classes, own.targets)
    assert all(image.tobytes() == other.tobytes() for (image, _), (other, _) in zip(images, own, strict=True))


def test_images_of_a_folder_are_listed_at_any_depth(folder):
    lines = []
    names = [path.relative_to(folder).as_posix() for path in find_images(folder, say=lines.append)]
    assert names == ["2.png", "cat/0.png", "cat/more/1.JPG", "dog/0.gif", "dog/1.tiff"]
    assert "hidden files (5, " in lines[0]
    assert len(lines) == 1
    assert [path.name for path in find_images(folder / "cat", say=lines.append)] == ["0.png", "1.JPG"]


def test_a_folder_of_images_alone_says_nothing(tmp_path):
    (tmp_path / "cat").mkdir()
    Image.new("L", (4, 2)).save(tmp_path / "cat" / "0.png")
    assert len(image_folder(tmp_path, say=pytest.fail)) == len(find_images(tmp_path, say=pytest.fail)) == 1


def test_a_folder_may_lie_at_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert len(find_images("~/cat", say=lambda line: None)) == 2
    assert image_folder("~/", say=lambda line: None).classes == ["cat", "dog"]
    monkeypatch.chdir(folder)
    lines = []
    assert len(image_folder(".", say=lines.append)) == len(find_images(".", say=lines.append)) - 1 == 4
    assert all("hidden files (5, such as .ipynb_checkpoints/0-checkpoint.png)" in line for line in lines)


@pytest.mark.parametrize("hidden", [".git", "__MACOSX"])
def test_a_folder_without_classes_is_refused(tmp_path, hidden):
    (tmp_path / hidden).mkdir()
    with pytest.raises(FileNotFoundError, match=r"^`root` must hold a folder for each class; got none in "):
        image_folder(tmp_path)


def test_a_class_without_images_is_refused(folder):
    (folder / "mouse").mkdir()
    with pytest.raises(FileNotFoundError, match="mouse"):
        image_folder(folder)
