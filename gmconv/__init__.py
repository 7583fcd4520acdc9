"""GMConv: the layer as it was trained (arXiv 2302.04544), and the surgery that removes it."""

from gmconv import models
from gmconv.certificate import BakeCertificate, LayerCertificate, bake_certificate
from gmconv.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from gmconv.layer import GMConv2d
from gmconv.mask import gaussian_mask
from gmconv.surgery import bake, convert

__all__ = [
    "BakeCertificate",
    "Checkpoint",
    "GMConv2d",
    "LayerCertificate",
    "bake",
    "bake_certificate",
    "convert",
    "gaussian_mask",
    "load_checkpoint",
    "models",
    "save_checkpoint",
]
