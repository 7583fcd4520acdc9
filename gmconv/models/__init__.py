"""The network zoo: public architectures under their public parameter names, plain or with Gaussian masks.

`create("resnet50")` is the GMConv network, `create("resnet50", gmconv=False)` its plain twin; `gmconv.models.resnet50`
is the same factory (a checkpoint's `arch` is "gmconv.models:resnet50").
"""

from gmconv.models.alexnet import alexnet
from gmconv.models.cifar_resnet import resnet8, resnet20, resnet32, resnet56
from gmconv.models.mobilenet import mobilenet_v2
from gmconv.models.registry import create
from gmconv.models.registry import names as list
from gmconv.models.resnet import resnet18, resnet34, resnet50, resnet101, resnet152
from gmconv.models.vgg import vgg11, vgg11_bn, vgg16, vgg16_bn

__all__ = [
    "alexnet",
    "create",
    "list",
    "mobilenet_v2",
    "resnet8",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet152",
    "vgg11",
    "vgg11_bn",
    "vgg16",
    "vgg16_bn",
]
