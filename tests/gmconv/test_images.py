"""Bytes of an image become the network's input exactly as the manifest says, or are refused."""

import errno
import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gmconv import images
from gmconv.errors import RefusedError
from gmconv.images import image_files, load_image
from gmconv.preprocessing import Preprocessing

RGB = Preprocessing(size=(8, 12), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
GREY = Preprocessing(size=(8, 8), mean=(0.0,), std=(1.0,), channel_order="L")


def encode(array: Any, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(stream, form, **options)
    return stream.getvalue()


PIXELS = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)


def test_an_image_of_the_right_size_is_only_scaled() -> None:
    found = load_image(encode(PIXELS), RGB)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, PIXELS.transpose(2, 0, 1) / 255, rtol=1e-6)


def test_mean_std_scale_and_channel_order() -> None:
    how = replace(RGB, scale=1.0, mean=(10.0, 20.0, 30.0), std=(2.0, 4.0, 8.0), channel_order="BGR")
    want = (PIXELS[..., ::-1] - np.array([10.0, 20, 30])) / np.array([2.0, 4, 8])
    np.testing.assert_allclose(load_image(encode(PIXELS), how), want.transpose(2, 0, 1), rtol=1e-6)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "PPM"])
def test_formats(form: str, tmp_path: Path) -> None:
    flat = np.full((9, 9, 3), 128, np.uint8)
    path = tmp_path / "image"
    path.write_bytes(encode(flat, form))
    np.testing.assert_allclose(load_image(path, RGB), 128 / 255, atol=0.02)
    np.testing.assert_array_equal(load_image(path, RGB), load_image(path.read_bytes(), RGB))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_every_pixel_mode_becomes_the_networks_channels(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 128 * 257, np.uint16))
    else:
        image = Image.new("RGB", (8, 8), (128, 128, 128)).convert(mode, palette=Image.Palette.ADAPTIVE)
    data = encode(image, "TIFF" if mode == "CMYK" else "PNG") if mode != "CMYK" else encode(image, "JPEG")
    assert load_image(data, RGB).shape == (3, 8, 12)
    found = load_image(data, GREY)
    assert found.shape == (1, 8, 8)
    if mode != "1":
        np.testing.assert_allclose(found, 128 / 255, atol=0.02)


def test_nearest_enlargement_repeats_pixels() -> None:
    small = np.random.default_rng(1).integers(0, 256, (4, 4), dtype=np.uint8)
    found = load_image(encode(small), replace(GREY, interpolation="nearest"))
    np.testing.assert_allclose(found[0], np.kron(small, np.ones((2, 2))) / 255, rtol=1e-6)


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: turn by 90 degrees clockwise
    stored = np.zeros((12, 8, 3), np.uint8)
    stored[:, 4:] = 255
    found = load_image(encode(stored, "PNG", exif=exif), RGB)
    assert found[:, 0].max() == 0
    assert found[:, -1].min() == 1


def test_shortest_then_crop_takes_the_centre_with_its_aspect_ratio() -> None:
    wide = np.zeros((10, 30), np.uint8)
    wide[:, 10:20] = 255
    how = replace(GREY, resize="shortest-then-crop", interpolation="nearest")
    np.testing.assert_array_equal(load_image(encode(wide), how), 1.0)
    assert load_image(encode(wide), GREY).min() == 0


def _torchvision(image: Image.Image, short: int, size: int) -> Any:
    """`Resize(short)` and `CenterCrop(size)` of torchvision.transforms, of a PIL image."""
    low, high = sorted(image.size)
    width, height = ((short if side == low else int(short * high / low)) for side in image.size)
    left, top = int(round((width - size) / 2.0)), int(round((height - size) / 2.0))  # noqa: RUF046
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


@given(width=st.integers(2, 60), height=st.integers(2, 60), ratio=st.sampled_from([1.0, 0.875, 0.9]))
def test_shortest_then_crop_is_what_torchvision_does(width: int, height: int, ratio: float) -> None:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    how = replace(RGB, size=(14, 14), resize="shortest-then-crop", crop_ratio=ratio)
    found = load_image(encode(pixels, "PNG"), how)
    expected = _torchvision(Image.fromarray(pixels), int(14 / ratio), 14)
    long = max(width, height) > 12 * min(width, height)
    np.testing.assert_allclose(found.transpose(1, 2, 0) * 255, expected, atol=2 if long else 0.01)


def test_crop_ratio_leaves_a_border_out() -> None:
    framed = np.zeros((16, 16), np.uint8)
    framed[4:12, 4:12] = 255
    how = replace(GREY, resize="shortest-then-crop", crop_ratio=0.5, interpolation="nearest")
    np.testing.assert_array_equal(load_image(encode(framed), how), 1.0)


def test_a_very_long_image_needs_no_large_intermediate() -> None:
    long = np.zeros((1, 20000), np.uint8)
    assert load_image(encode(long), replace(GREY, resize="shortest-then-crop")).shape == (1, 8, 8)


def test_an_image_too_large_is_refused_from_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 95)
    with pytest.raises(RefusedError, match="12 x 8 pixels"):
        load_image(encode(PIXELS), RGB)


def test_a_decompression_bomb_is_refused() -> None:
    bomb = encode(Image.new("1", (20000, 20000)))
    assert len(bomb) < 100_000
    with pytest.raises(RefusedError, match="too many pixels"):
        load_image(bomb, RGB)


@pytest.mark.parametrize("content", [b"", b"hello", b"%PDF-1.4", b"GIF89a" + bytes(20), b"II*\x00" + bytes(20)])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(RefusedError):
            load_image(source, RGB)


def test_what_the_system_refuses_is_no_damaged_image(tmp_path: Path) -> None:
    (loop := tmp_path / "loop.png").symlink_to("loop.png")
    with pytest.raises(RefusedError, match=r"loop.png: cannot be read \(Too many levels of symbolic links\)$"):
        load_image(loop, RGB)
    (empty := tmp_path / "empty.png").touch()
    with pytest.raises(RefusedError, match="empty.png: is empty"):
        load_image(empty, RGB)


def test_formats_with_large_decoders_stay_shut() -> None:
    for form in ("GIF", "TIFF", "ICO"):
        with pytest.raises(RefusedError, match="not a JPEG, PNG"):
            load_image(encode(PIXELS, form), RGB)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_truncated_and_damaged_images_are_refused_or_decoded_but_never_crash(form: str) -> None:
    whole = encode(PIXELS, form)

    @given(st.integers(0, len(whole) - 1), st.integers(0, 255), st.booleans())
    def damaged(at: int, value: int, cut: bool) -> None:
        broken = whole[:at] if cut else whole[:at] + bytes([value]) + whole[at + 1 :]
        try:
            assert load_image(broken, RGB).shape == (3, 8, 12)
        except RefusedError as refusal:
            assert "\n" not in refusal.message  # noqa: PT017

    damaged()


def test_preprocessing_for_other_channels_is_refused() -> None:
    with pytest.raises(RefusedError, match="1 means and 1 deviations for 3 channels"):
        load_image(encode(PIXELS), replace(GREY, channel_order="RGB"))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="no such file"):
        load_image(tmp_path / "none.png", RGB)


def test_the_images_of_a_folder_are_those_below_it_by_name(tmp_path: Path) -> None:
    for name in ("b/x.png", "a/deep/y.JPG", "a/notes.txt", "z.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [str(file.relative_to(tmp_path)) for file in image_files(tmp_path)] == ["a/deep/y.JPG", "b/x.png", "z.webp"]
    assert image_files(tmp_path / "none") == []


def test_links_are_followed_and_none_leads_round_for_ever(tmp_path: Path) -> None:
    for name in ("data/a/x.png", "data/b/y.png", "elsewhere/z.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    data = tmp_path / "data"
    targets = {"a/file.png": "../b/y.png", "a/folder": tmp_path / "elsewhere", "a/again": "folder", "b/a": "../a"}
    loops = {"b/up": "..", "b/.#locked.png": "editor@host", "a/top": tmp_path}
    for name, target in {**targets, **loops}.items():
        (data / name).symlink_to(target)
    found = [str(file.relative_to(data)) for file in image_files(data)]
    assert found == ["a/again/z.png", "a/file.png", "a/x.png", "b/y.png"], "each folder once"
    assert [file.name for file in image_files(data / "b")] == ["z.png", "file.png", "x.png", "y.png"]


@pytest.mark.parametrize("target", ["/nowhere/1.png", "{name}", "x.png/1.png"])
@pytest.mark.parametrize("name", ["1.png", "class", "v1.5"])
def test_a_link_to_nothing_is_refused_by_name(tmp_path: Path, name: str, target: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").touch()
    (link := tmp_path / "a" / name).symlink_to(target := target.format(name=name))
    with pytest.raises(RefusedError) as refused:
        image_files(tmp_path)
    assert refused.value.message == f"{link}: is a link to nothing ({target})"


def test_a_class_that_may_not_be_read_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shut").mkdir()
    listed = os.scandir

    def scandir(path: Path) -> Any:
        if Path(path).name == "shut":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="shut"):
        image_files(tmp_path)
