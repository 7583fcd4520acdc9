"""A network that computes with trained tensors which no state_dict holds is refused, by the place where they are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmconv.checkpoint.unsaved import saved_alone
from gmconv.errors import RefusedError


class Holder(nn.Module):
    """Convolves with what `make` puts into its attribute `held`."""

    def __init__(self, make: Callable[[nn.Conv2d], Any], call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.own = nn.Conv2d(3, 3, 1)
        self.held, self.call = make(nn.Conv2d(3, 3, 3)), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.held, self.own(x))


def closure(layer: nn.Conv2d) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x)


@pytest.mark.parametrize(
    ("make", "call", "place"),
    [
        (lambda layer: [layer], lambda held, x: held[0](x), "a.held[0].weight, a.held[0].bias"),
        (lambda layer: {"deep": (layer,)}, lambda held, x: held["deep"][0](x), "a.held['deep'][0].weight"),
        (lambda layer: [layer.weight], lambda held, x: F.conv2d(x, held[0] * 2), r"a.held[0]:"),
        (lambda layer: (nn.ModuleList([layer]), 1)[:1], lambda held, x: held[0][0](x), "a.held[0].0.weight"),
        (closure, lambda held, x: held(x), "a.held.weight"),
        (lambda layer: functools.partial(F.conv2d, weight=layer.weight), lambda held, x: held(x), "a.held:"),
        (lambda layer: (layer.weight.detach().requires_grad_(),), lambda held, x: F.conv2d(x, *held), "a.held[0]:"),
    ],
    ids=["list", "dict", "parameter", "module list in a tuple", "function", "partial", "leaf"],
)
def test_what_is_used_and_not_saved_is_named(
    make: Callable[[nn.Conv2d], Any], call: Callable[[Any, Tensor], Tensor], place: str
) -> None:
    model = nn.ModuleDict({"a": Holder(make, call)})
    with pytest.raises(RefusedError) as refused, torch.no_grad(), saved_alone(model):
        model["a"](torch.randn(1, 3, 4, 4))
    assert refused.value.message.startswith(place)


@pytest.mark.parametrize("why", ["saved too", "not used", "frozen", "a constant"])
def test_any_other_is_fine(why: str) -> None:
    """A second way to a child, a teacher that only training asks, a frozen part that the factory loads, a grid."""
    call = (lambda held, x: x) if why == "not used" else (lambda held, x: held[0](x))
    model = Holder(lambda layer: [layer], call)
    if why == "saved too":
        model.layer = model.held[0]
    if why == "frozen":
        model.held[0].requires_grad_(False)
    if why == "a constant":
        model.held = [functools.partial(F.conv2d, weight=torch.randn(3, 3, 3, 3))]
    with saved_alone(model):
        model(torch.randn(1, 3, 4, 4))


def test_a_view_of_what_is_saved_is_saved() -> None:
    """Under no_grad the parts of a parameter that a loop goes through are leaves of their own."""
    model = nn.Module()
    model.rows = nn.Parameter(torch.randn(3, 4))
    with torch.no_grad(), saved_alone(model):
        sum(row * 2 for row in model.rows)


def test_a_forward_that_fails_fails_as_it_would() -> None:
    model = Holder(lambda layer: [layer], lambda held, x: held[0](x).missing)
    with pytest.raises(AttributeError), saved_alone(model):
        model(torch.randn(1, 3, 4, 4))
