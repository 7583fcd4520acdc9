"""A network that uses a kernel outside of its layer keeps that kernel whole; every other network is cropped."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmconv.cropping.certificate import crop_model
from gmconv.cropping.check import layers_used_elsewhere
from gmconv.cropping.choose import choose_windows
from gmconv.cropping.table import crop_summary
from gmconv.cropping.window import Window


class Network(nn.Module):
    """Three 5x5 kernels, of which `middle` runs as `use` says."""

    def __init__(self, use: Callable[[nn.Conv2d, Tensor], Tensor], **middle: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 4, 5, padding=2)
        self.middle = nn.Conv2d(4, 4, 5, **{"padding": 2, **middle})
        self.last = nn.Conv2d(4, 4, 5, padding=2)
        self.use = use
        with torch.no_grad():
            for conv in (self.first, self.middle, self.last):
                conv.weight[..., (0, -1), :] = 0
                conv.weight[..., (0, -1)] = 0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(F.relu(self.use(self.middle, F.relu(self.first(x)))))
        return y


def tensorflow_same(conv: nn.Conv2d, x: Tensor) -> Tensor:
    rows, columns = (k - 1 for k in conv.kernel_size)
    y: Tensor = conv(F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)))
    return y


USES: dict[str, tuple[Callable[[nn.Conv2d, Tensor], Tensor], dict[str, int]]] = {
    "pads by the kernel's size, as TensorFlow does": (tensorflow_same, {"padding": 0}),
    "the weight with padding of the caller's": (lambda c, x: F.conv2d(x, c.weight, c.bias, padding=2), {}),
    "the weight, flattened": (lambda c, x: c(x) + (c.weight.flatten(1) @ torch.ones(100)).view(1, -1, 1, 1), {}),
    "a shape that has to fit": (lambda c, x: c(x) * c.weight.view(4, 100).mean(1).view(1, -1, 1, 1), {}),
}


@pytest.mark.parametrize("use", USES)
def test_a_kernel_used_outside_of_its_layer_stays_whole(use: str) -> None:
    run, arguments = USES[use]
    model = Network(run, **arguments).eval()
    x = torch.randn(3, 2, 12, 12)
    cropped, certificate = crop_model(model, 0, batches=[x])
    kept = {layer.name: layer.kept for layer in certificate.layers}
    assert kept["first"] == kept["last"] == (3, 3)
    assert kept["middle"] == (5, 5)
    assert certificate.used_elsewhere == ("middle",)
    assert "uses their kernels outside of them: middle" in crop_summary(certificate.to_dict())
    torch.testing.assert_close(cropped(x), model(x))


def test_an_ordinary_network_is_cropped_and_its_weights_are_put_back() -> None:
    model = Network(lambda conv, x: conv(x)).eval()
    with torch.no_grad():
        model.first.weight += 0.01
    before = {name: value.clone() for name, value in model.state_dict().items()}
    windows = choose_windows(model, 0.5)
    assert windows["first"] == Window(1, 1, 3, 3)
    assert layers_used_elsewhere(model, windows, torch.randn(1, 2, 12, 12)) == ()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Tied(nn.Module):
    """`a` and `b` share a weight; the parent reads it through `a`."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.b.weight = self.a.weight
        self.reads = reads

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x))
        return y + F.conv2d(x, self.a.weight, padding=1) if self.reads else y


@pytest.mark.parametrize(
    ("reads", "cut", "expected"),
    [(True, "ab", ("a",)), (True, "b", ()), (False, "ab", ()), (False, "a", ()), (False, "b", ())],
)
def test_layers_that_share_a_weight_are_judged_one_by_one(reads: bool, cut: str, expected: tuple[str, ...]) -> None:
    model = Tied(reads)
    weight = model.a.weight
    windows = {name: Window(1, 1, 1, 1) for name in cut}
    assert layers_used_elsewhere(model, windows, torch.randn(1, 2, 6, 6)) == expected
    assert model.a.weight is model.b.weight is weight


@pytest.mark.parametrize("reads", [True, False])
def test_class_numbers_count_as_outputs(reads: bool) -> None:
    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 8, 7, padding=3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = F.conv2d(x, self.conv.weight, padding=3)[..., :9, :9] if reads else self.conv(x)
            return y.argmax(1)

    torch.manual_seed(0)
    windows = {"conv": Window(2, 2, 3, 3)}
    assert layers_used_elsewhere(Classes(), windows, torch.randn(1, 2, 9, 9)) == (("conv",) if reads else ())


@pytest.mark.parametrize(("weights", "output"), [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)])
def test_an_output_cast_to_more_digits_is_not_held_to_them(weights: torch.dtype, output: torch.dtype) -> None:
    class Cast(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x.to(weights)).to(output)
            return y

    torch.manual_seed(0)
    model = Cast(*(nn.Conv2d(16, 16, 7, padding=3) for _ in range(3))).to(weights)
    windows = {str(index): Window(2, 2, 3, 3) for index in range(3)}
    assert layers_used_elsewhere(model, windows, torch.randn(1, 16, 12, 12)) == ()


def test_weights_are_put_back_whatever_happens() -> None:
    model = nn.Sequential(*(nn.Conv2d(2, 2, 3, padding=1, groups=2) for _ in range(2)))
    before = [conv.weight for conv in model]
    small = Window(1, 1, 1, 1)
    with pytest.raises(RuntimeError, match="channels"):
        layers_used_elsewhere(model, {"0": small}, torch.randn(1, 5, 6, 6))
    assert all(conv.weight is weight for conv, weight in zip(model, before, strict=True))


def test_a_network_that_depends_on_chance_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.AlphaDropout(0.5)).eval()
    model[1].forward = lambda x: x * torch.rand_like(x)  # type: ignore[method-assign]
    assert layers_used_elsewhere(model, {"0": Window(1, 1, 1, 1)}, torch.randn(1, 1, 6, 6)) == ("0",)
