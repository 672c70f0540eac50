"""Files and bytes that anyone may have made: turned, put on white, refused before they cost anything."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llm.errors import UserError
from tests.vision.pictures import levels, picture
from vision.opening import FORMATS, ImageLimits, file_under, open_image

RED, GREEN, BLUE, WHITE, GREY = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255), (128, 128, 128)


def stored(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(source: Path | bytes) -> np.ndarray:
    image = open_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


def png_header(width: int, height: int, rest: bytes = b"") -> bytes:
    """A PNG file of so many grey pixels as its header says, of which there are none."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rest)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_data_say(orientation):
    upright = levels(3, 5, 0)
    turns = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.swapaxes(0, 1), 6: np.rot90(upright, -1), 7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, 1),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels(stored(Image.fromarray(upright), exif=exif)), turns[orientation])


def test_a_file_and_its_bytes_give_the_same_picture(tmp_path):
    content = stored(picture(9, 7))
    (tmp_path / "a.png").write_bytes(content)
    assert np.array_equal(pixels(tmp_path / "a.png"), levels(9, 7, 0))
    assert np.array_equal(pixels(content), levels(9, 7, 0))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_levels_of_16_bits_are_divided_by_257(kind):
    deep = np.array([[0, 128, 129, 257], [25700, 32768, 65406, 65535]], dtype=np.uint16)
    expected = np.rint(deep / 257).astype(np.uint8)
    assert np.array_equal(pixels(stored(Image.fromarray(deep), kind)), np.repeat(expected[:, :, None], 3, axis=2))


def test_a_16_bit_level_that_stands_for_transparent_is_white():
    deep = Image.fromarray(np.array([[7, 65535, 0]], dtype=np.uint16))
    assert pixels(stored(deep, transparency=7))[0, :, 0].tolist() == [255, 255, 0]


def test_what_is_transparent_lies_on_white():
    see_through = Image.new("RGBA", (3, 1))
    for x, colour in enumerate([(255, 0, 0, 255), (0, 0, 0, 0), (0, 0, 0, 128)]):
        see_through.putpixel((x, 0), colour)
    # half of black on white: 255 - 128
    assert pixels(stored(see_through))[0].tolist() == [list(RED), list(WHITE), [127, 127, 127]]


def grey_beside_clear(mode: str) -> tuple[Image.Image, str, dict[str, object]]:
    """A grey pixel and a transparent black one: (picture, format, options of its file)."""
    palette = Image.fromarray(np.array([[1, 0]], dtype=np.uint8), "P" if mode in ("P", "PA") else "L")
    if mode in ("P", "PA"):
        palette.putpalette([0, 0, 0, *GREY])
    if mode == "P":
        return palette, "PNG", {"transparency": 0}
    if mode == "PA":
        alpha = palette.convert("PA")
        alpha.putalpha(Image.fromarray(np.array([[255, 0]], dtype=np.uint8)))
        return alpha, "TIFF", {}
    image = Image.new("RGBA", (2, 1), (*GREY, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    if mode == "LA":
        return image.convert("LA"), "PNG", {}
    return image.convert("RGB").convert(mode), "PNG", {"transparency": (0, 0, 0) if mode == "RGB" else 0}


@pytest.mark.parametrize("mode", ["LA", "PA", "L", "P", "RGB"])
def test_transparency_of_grey_palettes_and_one_colour_lies_on_white_too(mode):
    image, kind, options = grey_beside_clear(mode)
    assert pixels(stored(image, kind, **options))[0].tolist() == [list(GREY), list(WHITE)]


def test_palettes_grey_and_black_and_white_become_colours():
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *GREEN])
    palette.putpixel((1, 0), 1)
    assert pixels(stored(palette))[0].tolist() == [list(RED), list(GREEN)]
    assert pixels(stored(Image.new("L", (1, 1), 77)))[0, 0].tolist() == [77, 77, 77]
    assert pixels(stored(Image.new("1", (1, 1), 1)))[0, 0].tolist() == list(WHITE)


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_printing_colours_become_red_green_and_blue(kind):
    for ink, colour in (((0, 255, 255, 0), RED), ((255, 255, 0, 0), BLUE), ((0, 0, 0, 0), WHITE), ((0, 0, 0, 255), 0)):
        found = pixels(stored(Image.new("CMYK", (8, 8), ink), kind))
        assert np.abs(found.astype(int) - np.array(colour)).max() <= 2, ink  # JPEG rounds


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = stored(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert (pixels(content) == np.array(RED)).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_strips_of_one_pixel_are_pictures(size):
    assert pixels(stored(picture(*size))).shape == (*size, 3)


def test_floats_and_levels_beyond_16_bits_are_refused_as_no_one_knows_which_is_white():
    with pytest.raises(UserError, match="has floats as pixels"):
        open_image(stored(Image.new("F", (2, 2)), "TIFF"))
    with pytest.raises(UserError, match="has levels from -1 to 70000"):
        open_image(stored(Image.fromarray(np.array([[-1, 70000]], dtype=np.int32)), "TIFF"))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_file_is_refused_in_every_format(kind):
    content = stored(picture(40, 30), kind)
    for end in (len(content) // 2, len(content) * 9 // 10):
        with pytest.raises(UserError, match="cannot be decoded: |is no picture"):
            open_image(content[:end])


def test_what_is_no_picture_is_refused():
    for content in (b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n"):  # EPS would start a program
        with pytest.raises(UserError, match="is no picture of a known format"):
            open_image(content)


def test_a_missing_file_a_folder_and_too_long_a_name_are_refused(tmp_path):
    for path, line in ((tmp_path / "no.png", "does not exist"), (tmp_path, "is no file")):
        with pytest.raises(UserError, match=line):
            open_image(path)
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        open_image(tmp_path / ("a" * 300))


def test_too_many_bytes_or_pixels_are_refused_with_both_numbers(tmp_path):
    content = stored(picture(20, 30))
    (tmp_path / "a.png").write_bytes(content)
    for source in (content, tmp_path / "a.png"):
        assert open_image(source, ImageLimits(max_pixels=600, max_bytes=len(content))).size == (30, 20)
        with pytest.raises(UserError, match="has 30 x 20 pixels, more than max_pixels=599"):
            open_image(source, ImageLimits(max_pixels=599))
        with pytest.raises(UserError, match=f"has {len(content)} bytes, more than max_image_bytes={len(content) - 1}"):
            open_image(source, ImageLimits(max_bytes=len(content) - 1))
    with pytest.raises(UserError, match="has over 178956970 pixels, more than max_pixels=64000000"):
        open_image(png_header(100_000, 100_000))
    with pytest.raises(ValueError, match="max_pixels=200000000 is not from 1 to"):
        ImageLimits(max_pixels=200_000_000)


def test_a_name_that_leads_out_of_the_root_is_refused(tmp_path):
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    (root / "out").symlink_to(tmp_path)
    assert file_under(root, "a/../a/1.png") == (root / "a" / "1.png").resolve()
    for name in ("../1.png", "a/../../1.png", "/etc/passwd", "out/1.png"):
        with pytest.raises(UserError, match=f"image '{name}' is outside image_root "):
            file_under(root, name)
    with pytest.raises(UserError, match="is no path: "):
        file_under(root, "a\0b")


BOMBS = """
import sys
from pathlib import Path
from llm.errors import UserError
from vision.opening import open_image

def kilobytes(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])

Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
before = kilobytes("VmRSS")
for path in map(Path, sys.argv[1:]):
    try:
        open_image(path)
    except UserError as error:
        print(path.name, error)
    else:
        sys.exit(f"{path} was opened")
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not say how much it took")
def test_bombs_are_refused_within_50_megabytes(tmp_path):
    """Files that would take from 200 MB to 3 GB decoded, or 100 MB read."""
    with (tmp_path / "long.png").open("wb") as stream:
        stream.write(png_header(10, 10))
        stream.truncate(100 << 20)
    (tmp_path / "wide.png").write_bytes(png_header(40_000, 2_000))
    (tmp_path / "vast.png").write_bytes(png_header(30_000, 30_000))
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
    webp = bytearray(stored(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    canvas = webp.index(b"VP8X") + 12
    webp[canvas : canvas + 6] = (16_000 - 1).to_bytes(3, "little") * 2
    (tmp_path / "vast.webp").write_bytes(webp)
    gif = bytearray(stored(Image.new("P", (8, 8)), "GIF"))
    gif[6:10] = struct.pack("<HH", 60_000, 60_000)
    (tmp_path / "vast.gif").write_bytes(gif)
    files = map(str, sorted(tmp_path.iterdir()))
    ran = subprocess.run([sys.executable, "-c", BOMBS, *files], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout.splitlines()[-1]) < 50 << 10  # kilobytes
