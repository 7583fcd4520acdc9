"""GMConv: the layer as it was trained (arXiv 2302.04544), and the surgery that removes it.

The names below are imported when first used, so that a command's `--help` does not wait for torch.
"""

from __future__ import annotations

from gmconv.lazy import attach
from gmconv.version import __version__ as __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from gmconv import models as models
    from gmconv.certificate import BakeCertificate as BakeCertificate
    from gmconv.certificate import LayerCertificate as LayerCertificate
    from gmconv.certificate import bake_certificate as bake_certificate
    from gmconv.checkpoint import Checkpoint as Checkpoint
    from gmconv.checkpoint import load_checkpoint as load_checkpoint
    from gmconv.checkpoint import save_checkpoint as save_checkpoint
    from gmconv.constants import bake_constants as bake_constants
    from gmconv.cropping.certificate import crop_model as crop_model
    from gmconv.cropping.choose import crop as crop
    from gmconv.layer import GMConv2d as GMConv2d
    from gmconv.mask import gaussian_mask as gaussian_mask
    from gmconv.record import save_golden as save_golden
    from gmconv.surgery import bake as bake
    from gmconv.surgery import convert as convert

__getattr__, __dir__ = attach(
    __name__,
    {
        "BakeCertificate": ".certificate",
        "Checkpoint": ".checkpoint",
        "GMConv2d": ".layer",
        "LayerCertificate": ".certificate",
        "bake": ".surgery",
        "bake_certificate": ".certificate",
        "bake_constants": ".constants",
        "convert": ".surgery",
        "crop": ".cropping.choose",
        "crop_model": ".cropping.certificate",
        "deploy": "export.deployment",
        "gaussian_mask": ".mask",
        "load_checkpoint": ".checkpoint",
        "models": ".models:",
        "save_checkpoint": ".checkpoint",
        "save_golden": ".record",
    },
)
__all__ = __dir__()
