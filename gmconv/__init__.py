"""GMConv: the layer as it was trained (arXiv 2302.04544), and the surgery that removes it.

The names below are imported when first used, so that a command's `--help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gmconv import models
    from gmconv.certificate import BakeCertificate, LayerCertificate, bake_certificate
    from gmconv.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
    from gmconv.constants import bake_constants
    from gmconv.cropping.certificate import crop_model
    from gmconv.cropping.choose import crop
    from gmconv.layer import GMConv2d
    from gmconv.mask import gaussian_mask
    from gmconv.record import save_golden
    from gmconv.surgery import bake, convert

__all__ = [
    "BakeCertificate",
    "Checkpoint",
    "GMConv2d",
    "LayerCertificate",
    "bake",
    "bake_certificate",
    "bake_constants",
    "convert",
    "crop",
    "crop_model",
    "deploy",
    "gaussian_mask",
    "load_checkpoint",
    "models",
    "save_checkpoint",
    "save_golden",
]

_HOME = {
    "BakeCertificate": "certificate",
    "LayerCertificate": "certificate",
    "bake_certificate": "certificate",
    "bake_constants": "constants",
    "Checkpoint": "checkpoint",
    "load_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
    "crop": "cropping.choose",
    "crop_model": "cropping.certificate",
    "GMConv2d": "layer",
    "gaussian_mask": "mask",
    "save_golden": "record",
    "bake": "surgery",
    "convert": "surgery",
}


def __getattr__(name: str) -> Any:
    if name == "models":
        return importlib.import_module("gmconv.models")
    if name == "deploy":  # the one name from above this room: for a user, the network and its way out are one thing
        return importlib.import_module("export.deploy").deploy
    if name not in _HOME:
        raise AttributeError(f"module 'gmconv' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"gmconv.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
