"""VGG-11 and VGG-16, plain and with batch norm, as torchvision writes them (Simonyan & Zisserman, arXiv 1409.1556)."""

from __future__ import annotations

from torch import Tensor, nn

from gmconv.models.registry import check_sizes, register

# Output channels of each 3x3 convolution; "M" is a 2x2 max pool. Configurations A and D of the paper's table 1.
_A: tuple[int | str, ...] = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")
_D: tuple[int | str, ...] = (
    *(64, 64, "M", 128, 128, "M", 256, 256, 256, "M"),
    *(512, 512, 512, "M", 512, 512, 512, "M"),
)


class VGG(nn.Module):
    """`features`, 7x7 average pool, `classifier` (three linear layers). Input at least 32x32."""

    def __init__(
        self,
        layout: tuple[int | str, ...],
        batch_norm: bool,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        check_sizes(num_classes, in_channels)
        layers: list[nn.Module] = []
        channels = in_channels
        for entry in layout:
            if isinstance(entry, str):
                layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
                continue
            layers.append(nn.Conv2d(channels, entry, kernel_size=3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(entry))
            layers.append(nn.ReLU(inplace=True))
            channels = entry
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(True),
            nn.Dropout(dropout),
            nn.Linear(4096, num_classes),
        )
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, H, W)."""
        out: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return out


@register
def vgg11(num_classes: int = 1000, in_channels: int = 3, dropout: float = 0.5) -> nn.Module:
    """VGG-11 (configuration A): 132,863,336 parameters."""
    return VGG(_A, False, num_classes, in_channels, dropout)


@register
def vgg11_bn(num_classes: int = 1000, in_channels: int = 3, dropout: float = 0.5) -> nn.Module:
    """VGG-11 with batch norm: 132,868,840 parameters."""
    return VGG(_A, True, num_classes, in_channels, dropout)


@register
def vgg16(num_classes: int = 1000, in_channels: int = 3, dropout: float = 0.5) -> nn.Module:
    """VGG-16 (configuration D): 138,357,544 parameters."""
    return VGG(_D, False, num_classes, in_channels, dropout)


@register
def vgg16_bn(num_classes: int = 1000, in_channels: int = 3, dropout: float = 0.5) -> nn.Module:
    """VGG-16 with batch norm: 138,365,992 parameters."""
    return VGG(_D, True, num_classes, in_channels, dropout)
