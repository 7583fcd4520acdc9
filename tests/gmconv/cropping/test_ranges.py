"""Bounds on what goes into a convolution: they hold for every input, or there is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gmconv.cropping.choose import crop_model
from gmconv.cropping.measure import measure_input_ranges
from gmconv.cropping.ranges import analytic_input_ranges
from gmconv.surgery import bake, convert


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    measure_input_ranges(model, [torch.randn(4, 1, 3, 3)])
    analytic_input_ranges(model, torch.randn(4, 1, 3, 3))
    assert model.training
    assert not model[1].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model[0]._forward_pre_hooks


def test_bounded_activations_carry_through() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.summed, self.joined, self.lost = (nn.Conv2d(c, 2, 1) for c in (2, 2, 4, 2))

        def forward(self, x: Tensor) -> Tensor:
            a = torch.sigmoid(self.first(x))
            b = nn.functional.hardtanh(x, -2, 1)
            c = nn.functional.max_pool2d(nn.functional.pad(b, (1, 1, 1, 1)), 3, 1)
            total: Tensor = self.summed(a + 3 * c).sum() + self.joined(torch.cat([a, b], 1)).sum()
            return total + self.lost(self.first(x)).sum()

    model = Branches()
    ranges = analytic_input_ranges(model, torch.randn(1, 2, 6, 6))
    assert ranges == {"summed": 7.0, "joined": 2.0}
    assert analytic_input_ranges(model, torch.randn(1, 2, 6, 6), 0.5)["first"] == 0.5


@pytest.mark.parametrize(
    "write",
    [
        lambda y: y.exp_(),
        lambda y: y[..., 0].mul_(100),
        lambda y: y.flatten()[1:].add_(100),
    ],
    ids=["itself", "a view", "a view of a view"],
)
def test_writing_in_place_forgets_the_whole(write: Callable[[Tensor], Tensor]) -> None:
    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(x)
            write(y)
            out: Tensor = self.conv(y)
            return out

    assert analytic_input_ranges(Grows(), torch.randn(1, 1, 2, 2)) == {}


@torch.library.custom_op("gmconv_tests::relu", mutates_args=())
def relu_of_another_library(x: Tensor) -> Tensor:
    """Named like torch's, and a hundred times it."""
    return x.clamp(min=0) * 100


@pytest.mark.parametrize(
    "grow",
    [
        lambda y: nn.functional.avg_pool2d(y, 2, divisor_override=1),
        lambda y: y.view(torch.int32).float(),
        lambda y: y.to(torch.uint8).float(),
        lambda y: torch.div(y, 4, rounding_mode="floor"),
        lambda y: torch.ops.gmconv_tests.relu(y),
        lambda y: nn.functional.dropout(y, 0.5, training=True),
    ],
    ids=["a divisor of 1", "its bits as int32", "-1 as uint8", "floor(-0.1)", "another relu", "dropout that stays on"],
)
def test_what_may_grow_ends_a_bound(grow: Callable[[Tensor], Tensor]) -> None:
    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept, self.conv = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(x)
            out: Tensor = self.kept(nn.functional.avg_pool2d(y, 2)).sum() + self.conv(grow(y))
            return out

    assert analytic_input_ranges(Grows(), torch.randn(1, 1, 4, 4)) == {"kept": 1.0}


def test_layers_in_a_branch_of_cond_are_neither_bounded_nor_measured() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.yes, self.no = (nn.Conv2d(1, 1, 3, padding=1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.first(torch.tanh(x)))
            out: Tensor = torch.cond(x.mean() > 0, lambda y: self.yes(y), lambda y: self.no(y), (x,))
            return out

    model, batch = bake(convert(Branches(), sigma=0.6)), torch.randn(2, 1, 8, 8)
    assert analytic_input_ranges(model, batch) == {}
    assert list(measure_input_ranges(model, [batch])) == ["first"]
    cropped, certificate = crop_model(model, 0.5, batches=[batch])
    assert [layer.name for layer in certificate.layers if layer.measured is None] == ["yes", "no"]
    assert torch.isfinite(cropped(batch)).all()


def test_sparse_tensors_have_no_memory_to_share() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            torch.eye(2).to_sparse().mul_(2)
            out: Tensor = self.conv(torch.tanh(x))
            return out

    assert analytic_input_ranges(Sparse(), torch.randn(1, 1, 2, 2)) == {"conv": 1.0}


def test_a_shared_layer_needs_a_bound_at_every_use() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.conv(self.conv(torch.tanh(x)))
            return out

    assert analytic_input_ranges(Shared(), torch.randn(1, 1, 2, 2)) == {}
