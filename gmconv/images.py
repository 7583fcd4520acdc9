"""From the bytes of an image to the network's input, by the manifest's preprocessing."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gmconv.classes import composed
from gmconv.errors import RefusedError
from gmconv.files import refuse_broken_link
from gmconv.packages import require
from gmconv.preprocessing import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image

Floats = NDArray[np.float32]
T = TypeVar("T")

#: Decoders that a stranger's bytes may reach; the others of PIL stay shut.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM")
#: Their files.
TAKEN = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".webp")
#: Files that count as images in a folder. One of another format is refused by name rather than skipped.
SUFFIXES = frozenset({*TAKEN, ".gif", ".tif", ".tiff"})
#: Largest image in pixels (100 MB decoded), read from its header before anything is decoded.
MAX_PIXELS = 2**25
MAX_SIDE = 30_000
"""PIL's intermediate images of longer ones are many times the image."""
_LONG = 16  # times the pixels of the input: the largest image that is made whole before its centre is cut out


def image_files(folder: Path) -> list[Path]:
    """Every image in a folder or below it, by name.

    Raises OSError, also for a folder below that may not be read, and RefusedError for a link to nothing: what it should
    lead to, an image or a folder of them, would be missing without a word.
    """
    return sorted(walked_images(folder), key=lambda file: Path(composed(str(file))))


def walked_images(folder: Path) -> Iterator[Path]:
    """The files of `image_files` as they are found. Links are followed, a folder is read once, none above is."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    seen = {str(parent) for parent in Path(os.path.realpath(folder)).parents}
    for root, below, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(root)) in seen:
            below.clear()
            continue
        seen.add(real)
        below.sort(key=lambda name: (Path(root, name).is_symlink(), name))
        for file in (Path(root, name) for name in names):
            refuse_broken_link(file)
            if file.suffix.lower() in SUFFIXES and file.is_file():
                yield file


def load_image(source: bytes | Path, preprocessing: Preprocessing) -> Floats:
    """Decode one image and prepare it: float32 `(C, H, W)`, C = 1 for channel order "L", else 3.

    `source` is a file or its bytes: JPEG, PNG, WebP, BMP or PPM, turned as its EXIF orientation says, first frame.

    Raises:
        RefusedError: not such an image, truncated, more than 33 million pixels, or 30,000 on a side.
        UnavailableError: pillow is not installed.
    """
    return _decoded(source, lambda image: preprocess(image, preprocessing))


def load_mask(source: Path, preprocessing: Preprocessing, photo: Path) -> NDArray[Any]:
    """Decode a mask, one class index per pixel, and cut and size it as its image: integers `(H, W)`, nearest neighbour.

    An indexed or a greyscale PNG of 8 or 16 bit. Raises as `load_image`, and RefusedError for one in colours, or of
    other proportions than the image in `photo`, which it then does not cover.
    """
    wide, tall = _decoded(photo, _shown_size)

    def prepared(image: Image) -> NDArray[Any]:
        from PIL.Image import fromarray

        if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
            raise RefusedError(f"{source}: a mask of mode {image.mode}; one class index per pixel is needed (L or P)")
        if abs(image.height - image.width * tall / wide) > 1:
            raise RefusedError(
                f"{source}: {image.width} x {image.height} pixels, its image {wide} x {tall}; a mask covers its image"
            )
        values = np.asarray(image)
        cut = _sized(fromarray(values.astype(np.int32)), preprocessing, "nearest")
        return np.asarray(cut).astype(np.uint8 if values.dtype.itemsize == 1 else np.int32)

    return _decoded(source, prepared)


def _shown_size(image: Image) -> tuple[int, int]:
    """Width and height, turned upright by EXIF."""
    turned = image.getexif().get(0x0112, 1) >= 5
    return (image.height, image.width) if turned else image.size


def _decoded(source: bytes | Path, use: Callable[[Image], T]) -> T:
    """What `use` makes of the opened image; every failure in one sentence."""
    pil = require("PIL.Image", "serve")
    name = str(source) if isinstance(source, Path) else "the image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's own bomb warning: the bound below is tighter
            opened = pil.open(source if isinstance(source, Path) else io.BytesIO(source), formats=FORMATS)
            with opened as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise RefusedError(f"{name}: {width} x {height} pixels; at most {MAX_PIXELS:,} are decoded")
                if max(width, height) > MAX_SIDE:
                    raise RefusedError(f"{name}: {width} x {height} pixels; no side may be longer than {MAX_SIDE:,}")
                return use(image)
    except FileNotFoundError as error:
        raise RefusedError(f"{name}: no such file") from error
    except pil.UnidentifiedImageError as error:
        if not (source.stat().st_size if isinstance(source, Path) else source):
            raise RefusedError(f"{name}: is empty; copy the image again") from error
        raise RefusedError(f"{name}: not a JPEG, PNG, WebP, BMP or PPM image; convert it") from error
    except pil.DecompressionBombError as error:
        raise RefusedError(f"{name}: too many pixels; at most {MAX_PIXELS:,} are decoded") from error
    except RefusedError:
        raise
    except Exception as error:  # a hostile file can make a decoder raise anything
        if isinstance(error, OSError) and error.errno:  # the system's, not a decoder's
            raise RefusedError(f"{name}: cannot be read ({error.strerror})") from error
        why = str(error) or type(error).__name__
        raise RefusedError(f"{name}: cannot be decoded ({why[:120]}); save the image again") from error


def preprocess(image: Image, preprocessing: Preprocessing) -> Floats:
    """A PIL image as float32 `(C, H, W)`.

    Turned upright by EXIF; converted to RGB or greyscale (alpha is dropped, 16 bit become 8); resampled to `size` by
    PIL, the whole image ("stretch") or as torchvision's `Resize(int(size / crop_ratio))` and `CenterCrop(size)` do, to
    the bit ("shortest-then-crop"; of images more than a dozen times as long as wide to a grey level or two); then
    `(x * scale - mean) / std` in float32.
    """
    from PIL import ImageOps
    from PIL.Image import fromarray

    image = ImageOps.exif_transpose(image) or image
    if image.mode.startswith(("I;16", "I")):
        image = fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    image = image.convert("L" if preprocessing.channel_order == "L" else "RGB")
    values = np.asarray(_sized(image, preprocessing, preprocessing.interpolation), dtype=np.float32)
    values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    if preprocessing.channel_order == "BGR":
        values = values[::-1]
    return _normalized(values, preprocessing, preprocessing.scale)


def prepare_grey(image: Floats, channels: int, preprocessing: Preprocessing) -> Floats:
    """A grey image (H, W) of values in [0, 1] instead of 0..255 and of the input's size, as `preprocess` would have it:
    float32 `(channels, H, W)`. Raises RefusedError where there is not a mean for each channel."""
    if preprocessing.resize != "stretch":
        fromarray = require("PIL.Image", "serve").fromarray
        fitted = replace(preprocessing, size=image.shape)
        image = np.asarray(_sized(fromarray(image), fitted, preprocessing.interpolation), dtype=np.float32)
    return _normalized(np.repeat(image[None], channels, axis=0), preprocessing, 255 * preprocessing.scale)


def _normalized(values: Floats, preprocessing: Preprocessing, scale: float) -> Floats:
    mean, std = (np.asarray(v, dtype=np.float32)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
    if len(mean) != len(values) or len(std) != len(values):
        raise RefusedError(
            f"the preprocessing has {len(mean)} means and {len(std)} deviations for {len(values)} channels"
        )
    return np.ascontiguousarray((values * np.float32(scale) - mean) / std)


def _sized(image: Image, preprocessing: Preprocessing, interpolation: str) -> Image:
    """`image` resampled to `size` by PIL."""
    from PIL.Image import Resampling

    rows, columns = preprocessing.size
    how = Resampling[interpolation.upper()]
    if preprocessing.resize == "stretch":
        return image.resize((columns, rows), how)
    width, height = image.size
    if rows * width >= columns * height:  # the height decides
        tall = int(rows / preprocessing.crop_ratio)
        wide = int(tall * width / height)
    else:
        wide = int(columns / preprocessing.crop_ratio)
        tall = int(wide * height / width)
    left, upper = round((wide - columns) / 2), round((tall - rows) / 2)
    if wide * tall <= _LONG * rows * columns:
        return image.resize((wide, tall), how).crop((left, upper, left + columns, upper + rows))
    across, down = width / wide, height / tall  # the same to a grey level or two, without a long image in between
    part = (left * across, upper * down, min(width, (left + columns) * across), min(height, (upper + rows) * down))
    return image.resize((columns, rows), how, part)
