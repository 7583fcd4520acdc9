"""Modules that merge their own branches: by whichever method they have, and never unmeasured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gmconv.constants import bake_constants
from gmconv.errors import SurgeryError
from gmconv.fusing import fuse_modules


class Branches(nn.Module):
    """Two parallel convolutions that become one."""

    def __init__(self, wrong: float = 0.0) -> None:
        super().__init__()
        self.a, self.b, self.wrong = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), wrong

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) if hasattr(self, "b") else self.a(x)

    def switch_to_deploy(self) -> None:
        self.a.weight += nn.functional.pad(self.b.weight, (1, 1, 1, 1)) + self.wrong
        self.a.bias += self.b.bias
        del self.b


class Normed(nn.Sequential):
    """A convolution and its BatchNorm; `fuse` returns another module."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        return torch.nn.utils.fuse_conv_bn_eval(self[0], self[1])


IMAGE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_every_method_is_called_and_the_argument_left_alone() -> None:
    model = nn.Sequential(Branches(), Normed(), nn.ReLU(), nn.Sequential(Branches())).eval()
    model[1][1].running_mean.normal_()
    fused, names = fuse_modules(model, IMAGE, tolerance=2e-5)
    assert names == ("0", "1", "3.0")
    assert sum(isinstance(m, nn.Conv2d) for m in fused.modules()) == 3
    assert hasattr(model[0], "b")
    torch.testing.assert_close(fused(IMAGE), model(IMAGE))


def test_the_module_that_changes_the_network_is_named() -> None:
    model = nn.Sequential(Branches(), Branches(wrong=0.01), Branches()).eval()
    with pytest.raises(SurgeryError, match=r"layer '1' \(Branches\): its switch_to_deploy\(\) changes .* of its RMS"):
        fuse_modules(model, IMAGE, tolerance=2e-5)


def test_a_method_that_fails_is_named_and_a_network_without_any_comes_back() -> None:
    class Broken(nn.Identity):
        def reparameterize(self) -> None:
            raise RuntimeError("not trained yet")

    with pytest.raises(SurgeryError, match=r"layer '0' \(Broken\): its reparameterize\(\) fails \(not trained yet\)"):
        fuse_modules(nn.Sequential(Broken()).eval(), IMAGE, tolerance=2e-5)
    assert fuse_modules(nn.Sequential(nn.Conv2d(4, 4, 1)).eval(), IMAGE, tolerance=2e-5).modules == ()


class Masked(nn.Conv2d):
    """A layer of somebody's own: its kernel is masked while it runs."""

    def mask(self) -> Tensor:
        return torch.linspace(0.5, 1, 9).view(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask(), self.bias)


class MaskedBranches(Branches):
    """Its method asks the layer for the mask, which a baked layer has no more."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Masked(4, 4, 3, padding=1)

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        merged = nn.Conv2d(4, 4, 3, padding=1)
        merged.weight.copy_(self.a.weight * self.a.mask() + nn.functional.pad(self.b.weight, (1, 1, 1, 1)))  # type: ignore[operator]
        merged.bias.copy_(self.a.bias + self.b.bias)  # type: ignore[operator,union-attr]
        self.a = merged
        del self.b


def test_a_method_that_asks_for_the_mask_gets_the_layer_as_it_was_trained() -> None:
    model = nn.Sequential(MaskedBranches(), nn.ReLU(), nn.Sequential(MaskedBranches())).eval()
    baked, _ = bake_constants(model, IMAGE)
    with pytest.raises(SurgeryError, match="no attribute 'mask'"):
        fuse_modules(baked, IMAGE, tolerance=2e-5)
    fused, names = fuse_modules(baked, IMAGE, tolerance=2e-5, live=model)
    assert names == ("0", "2.0")
    assert not any(isinstance(module, Masked) for module in fused.modules())
    assert hasattr(model[0], "b")
    torch.testing.assert_close(fused(IMAGE), model(IMAGE))


def test_what_is_wrong_with_the_live_layer_too_is_said_of_that() -> None:
    class Wrong(MaskedBranches):
        def switch_to_deploy(self) -> None:
            super().switch_to_deploy()
            self.a.weight.data += 0.01

    model = nn.Sequential(Wrong()).eval()
    with pytest.raises(SurgeryError, match=r"layer '0' \(Wrong\): its switch_to_deploy\(\) changes"):
        fuse_modules(bake_constants(model, IMAGE)[0], IMAGE, tolerance=2e-5, live=model)
