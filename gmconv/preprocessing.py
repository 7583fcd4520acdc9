"""How an image becomes a network's input, as checkpoints and manifests record it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import msgspec

from gmconv.errors import RefusedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """From a decoded image to the network's input (float32, C x H x W).

    Resize to `size` (height, width, pixels) as `resize` says: "stretch", or "shortest-then-crop", which is
    torchvision's Resize(int(size / crop_ratio)) and CenterCrop(size). Multiply the 0..255 values by `scale`, subtract
    `mean`, divide by `std` (one value per channel). `channel_order` "L" is greyscale.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1 / 255
    channel_order: Literal["RGB", "BGR", "L"] = "RGB"
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    resize: Literal["stretch", "shortest-then-crop"] = "stretch"
    crop_ratio: float = 1.0


def read_preprocessing(fields: dict[str, Any] | None) -> Preprocessing | None:
    """A checkpoint's preprocessing dict as its type. Raises RefusedError when it does not fit."""
    try:
        return msgspec.convert(fields, Preprocessing) if fields is not None else None
    except msgspec.ValidationError as error:
        raise RefusedError(f"the checkpoint's preprocessing is damaged ({error}); save it again") from error


def differences(own: Preprocessing, other: Preprocessing) -> str:
    """In what `own` prepares images otherwise, in words: "mean 0, 0, 0 (not 0.5, 0.5, 0.5)"; empty where in nothing."""
    crops = "shortest-then-crop" in (own.resize, other.resize)
    names = [field.name for field in fields(own) if crops or field.name != "crop_ratio"]
    found = ((name, getattr(own, name), getattr(other, name)) for name in names)
    return ", ".join(f"{name} {_shown(mine)} (not {_shown(its)})" for name, mine, its in found if not _same(mine, its))


def _same(mine: Any, its: Any) -> bool:
    """Numbers may have been float32 on their way."""
    ours, others = _each(mine), _each(its)
    return len(ours) == len(others) and all(
        one == other if isinstance(one, str) else math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)
        for one, other in zip(ours, others, strict=True)
    )


def _shown(value: Any) -> str:
    return ", ".join(one if isinstance(one, str) else f"{one:.6g}" for one in _each(value))


def _each(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple | list) else (value,)
