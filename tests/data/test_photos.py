"""Photos in every mode, damaged ones, and pictures that the package itself made."""

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import PHOTOS
from timm_bcos import InputError
from timm_bcos.data.photos import find_photos, is_own_picture, open_photo
from timm_bcos.explanation.visualization import save_image

RAMP = np.linspace(0, 1, 256).reshape(16, 16)
WIDE = {
    "sixteen.png": (RAMP * 65535).astype(np.uint16),
    "sixteen.tif": (RAMP * 65535).astype(np.uint16),
    "big_endian.tif": (RAMP * 65535).astype(np.uint16),
    "eight_in_32.tif": (RAMP * 255).astype(np.int32),
    "sixteen_in_32.tif": (RAMP * 65535).astype(np.int32),
    "thirty_two.tif": (RAMP * (2**31 - 1)).astype(np.int32),
    "unit.tif": RAMP.astype(np.float32),
    "float_255.tif": (RAMP * 255).astype(np.float32),
    "any_float.tif": (RAMP * 3e9 - 1e9).astype(np.float32),
    "large_float.tif": (RAMP * 3e9).astype(np.float32),
}
BIG_ENDIAN = Image.frombytes("I;16B", (16, 16), (RAMP * 65535).astype(">u2").tobytes())


def test_wider_numbers_take_less_than_a_copy_in_float64(tmp_path: Path) -> None:
    Image.fromarray(np.arange(1_000_000).reshape(1000, 1000).astype(np.uint16)).save(tmp_path / "a.png")
    tracemalloc.start()
    try:
        open_photo(tmp_path / "a.png", "L")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 8 * 1_000_000


@pytest.mark.parametrize("name", WIDE)
def test_pictures_of_wider_numbers_keep_their_greys(name: str, tmp_path: Path) -> None:
    image = Image.fromarray(WIDE[name]) if name != "big_endian.tif" else BIG_ENDIAN
    image.save(tmp_path / name)
    for mode in ("RGB", "L"):
        photo = open_photo(tmp_path / name, mode)
        assert photo.mode == mode
        gray = np.asarray(photo).reshape(16, 16, -1)[..., 0]
        assert np.abs(gray - RAMP * 255).max() <= 1


def test_dark_pictures_of_sixteen_bits_stay_dark(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 6553, np.uint16)).save(tmp_path / "dark.png")
    assert np.asarray(open_photo(tmp_path / "dark.png")).max() == 25  # a tenth of white
    for white, value in ((np.float32(0), 0), (np.float32(1), 255)):
        Image.fromarray(np.full((4, 4), white)).save(tmp_path / "flat.tif")
        assert np.asarray(open_photo(tmp_path / "flat.tif")).max() == value


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, np.nan], [1, 0.5]], np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(InputError, match="not finite"):
        open_photo(tmp_path / "nan.tif")


def test_sizes_that_no_photo_has(tmp_path: Path) -> None:
    Image.new("1", (30000, 30000)).save(tmp_path / "bomb.png")
    Image.new("L", (1, 30000)).save(tmp_path / "thread.png")
    tracemalloc.start()
    with pytest.raises(InputError, match="too large an image"):
        open_photo(tmp_path / "bomb.png")
    with pytest.raises(InputError, match=r"too long and thin: 1 × 30000 pixels, at most 1 : 100"):
        open_photo(tmp_path / "thread.png")
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_photos_of_a_hundred_million_pixels_are_photos(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    Image.new("1", (11648, 8736)).save(tmp_path / "large.png")
    assert open_photo(tmp_path / "large.png", "L").size == (11648, 8736)
    assert not recwarn.list


def test_broken_exif_does_not_spoil_a_photo(tmp_path: Path) -> None:
    Image.open(PHOTOS / "coffee.jpg").resize((32, 24)).save(tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert open_photo(tmp_path / "x.jpg").size == (32, 24)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.dds", b"DDS \x7c\0\0\0" + bytes(range(1, 200))),
        ("x.avif", b"\0\0\0\x20ftypavif" + bytes(range(200))),
        ("x.png", b"\x89PNG\r\n\x1a\n" + bytes(40)),
        ("x.jpg", b""),
    ],
)
def test_damaged_files_of_many_formats(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError):
        open_photo(tmp_path / name)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    for path in (tmp_path, tmp_path / "pipe.png", Path("/dev/zero")):
        with pytest.raises(InputError, match="no regular file"):
            open_photo(path)
    for name in ("none.png", "n" * 300 + ".png"):
        with pytest.raises(InputError):
            open_photo(tmp_path / name)
    assert list(find_photos([tmp_path / ("n" * 300)])) == [tmp_path / ("n" * 300)]


@pytest.mark.parametrize("suffix", ["png", "webp", "gif"])
def test_animated_images_say_that_one_picture_is_taken(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = [Image.new("RGB", (32, 32), (80 * k, 0, 0)) for k in range(3)]
    path = tmp_path / f"x.{suffix}"
    pictures[0].save(path, save_all=True, append_images=pictures[1:])
    assert np.asarray(open_photo(path)).max() <= 1
    assert "only its first frame is used" in caplog.text


def test_own_pictures_are_recognized_and_hidden_files_left_out(tmp_path: Path) -> None:
    save_image(torch.rand(8, 8, 3), tmp_path / "own.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "folder.png").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / ".hidden" / "x.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "._other.png")
    (tmp_path / "text.png").write_text("no picture")
    found = list(find_photos([tmp_path]))
    assert [(path.name, is_own_picture(path)) for path in found] == [
        ("other.png", False),
        ("own.png", True),
        ("text.png", False),
    ]
