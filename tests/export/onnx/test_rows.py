"""Whether samples of a batch influence each other: yes or no, however little, at whatever scale; no false alarms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from export.onnx.reference import Work, compute_reference
from export.onnx.rows import rows_apart
from gmconv.inputs import Input

SHAPE = (3, 6, 6)
Forward = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """A convolution, what a test says, and a mean over the pixels where it leaves any."""

    def __init__(self, between: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.between = nn.Conv2d(3, 8, 3), between

    def forward(self, input: Tensor) -> Tensor:
        found = self.between(self.conv(input))
        return found.mean((2, 3)) if found.ndim == 4 else found


def apart(model: nn.Module, *, real: bool = False, batch: int | None = None) -> float:
    """What the reference finds on noise in batches of 1, 2, 3, or `batch`; `real`: and on sixteen images."""
    generator = np.random.default_rng(0)
    shapes = [(count, *SHAPE) for count in ([batch] if batch else [1, 2, 3])]
    feeds = [{"input": generator.standard_normal(shape, dtype=np.float32)} for shape in shapes]
    noise = frozenset(range(len(feeds)))
    if real:
        feeds.append({"input": generator.random((16, *SHAPE), dtype=np.float32)})
    nothing: frozenset[int] = frozenset()
    work = Work(tuple(feeds), (), noise, frozenset({0}), nothing, {"dynamic": "keep", "batch": batch or 2})
    return compute_reference(model.eval(), [Input("input", SHAPE)], work).apart


def neighbours(x: Tensor) -> Tensor:
    """Attention over the batch: rows that are alike share, others weigh e^-1000."""
    flat = x.flatten(1)
    return torch.softmax(-(torch.cdist(flat, flat) ** 2) * 20, dim=1) @ flat


MEETING: dict[str, Forward] = {
    "weak mean": lambda x: x * (1 + 1e-6 * x.mean()),
    "strong mean": lambda x: x * torch.sigmoid(5 * x.mean((2, 3), keepdim=True).mean(0)),
    "maximum": lambda x: x / x.amax((0, 2, 3), keepdim=True),
    "softmax over axis 0": lambda x: torch.softmax(x, 0),
    "batch statistics": lambda x: F.batch_norm(x, None, None, training=True),
    "quantile": lambda x: x.clamp(max=float(torch.quantile(x, 0.9))),
    "large values alone": lambda x: x * (1 + 1e-4 * F.relu(x.max() - 30)),
    "tiny values alone": lambda x: x * (1 + F.relu(0.3 - x.abs().max())),
    "neighbours": neighbours,
    "the batch's size": lambda x: x / len(x),
    "place in the batch": lambda x: x + torch.arange(len(x)).view(-1, 1, 1, 1),
    "classes": lambda x: (x.mean((2, 3)) - x.mean((0, 2, 3))).argmax(1),
    "padding to the longest": lambda x: x.flatten(1)[:, : int((x > 0).flatten(1).sum(1).max())],
}


@pytest.mark.parametrize("between", MEETING.values(), ids=MEETING.keys())
def test_samples_that_meet_are_found(between: Forward) -> None:
    assert apart(Net(between)) > 0


def scattered(x: Tensor) -> Tensor:
    """Rows of any number computed together, as detectors do with what they find."""
    flat = x.permute(0, 2, 3, 1).reshape(-1, 8)
    chosen = (flat[:, 0] > 0).nonzero().squeeze(1)
    return torch.zeros_like(flat).index_copy(0, chosen, F.normalize(flat[chosen] @ torch.ones(8, 8))).view(len(x), -1)


def best(x: Tensor) -> Tensor:
    """The features of the best places, of which a flat image has many that are as good."""
    flat = (x * 0 + x.mean((2, 3), keepdim=True)).flatten(2)
    where = flat.sum(1).topk(3).indices
    return torch.arange(16.0).sin()[where]


def attention(x: Tensor) -> Tensor:
    tokens = x.flatten(2).mT
    return F.scaled_dot_product_attention(tokens, tokens, tokens).flatten(1)


INDEPENDENT: dict[str, Forward] = {
    "batch norm": nn.BatchNorm2d(8),
    "group norm": nn.GroupNorm(2, 8),
    "instance norm": nn.InstanceNorm2d(8),
    "attention over tokens": attention,
    "own maximum": lambda x: x / x.amax((1, 2, 3), keepdim=True),
    "saturated": lambda x: 1 - torch.sigmoid(100 * x.mean((2, 3)) ** 2 + 36),
    "steps": lambda x: torch.round(x * 8) / 8,
    "ties": best,
    "classes": lambda x: x.mean((2, 3)).argmax(1),
    "scattered": scattered,
    "overflow": lambda x: torch.exp(x.mean((2, 3)) * 100),
    "a constant of five": lambda x: torch.arange(5.0),
}


@pytest.mark.parametrize("between", INDEPENDENT.values(), ids=INDEPENDENT.keys())
def test_independent_samples_are_not_suspected(between: Forward) -> None:
    assert apart(Net(between), real=True) == 0


@pytest.mark.parametrize("weight", [0.0, 1e-3])
def test_where_float64_is_not_to_be_had_float32_tells(weight: float) -> None:
    generator = np.random.default_rng(0)
    kernel = generator.standard_normal((500, 300), dtype=np.float32)

    def single(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = feeds["input"] @ kernel
        return {"logits": found * (1 + np.float32(weight) * found.mean())}

    def double(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise TypeError("no float64 here")

    noise = [{"input": generator.standard_normal((3, 500), dtype=np.float32)}]
    assert (rows_apart([double, single], noise, []) > 0) == (weight > 0)
    assert rows_apart([double, double], noise, []) == 0


@given(st.floats(-6, 0), st.sampled_from(["mean", "amax", "std", "median"]), st.booleans())
@settings(max_examples=12, deadline=None)
def test_what_is_computed_of_the_batch_is_found_however_little_it_weighs(
    exponent: float, statistic: str, of_all: bool
) -> None:
    def weighed(x: Tensor) -> Tensor:
        rows = x.flatten() if of_all else x.flatten(1)
        found = getattr(torch, statistic)(rows, -1)
        found = found[0] if statistic == "median" and not isinstance(found, Tensor) else found
        return x.flatten(1) + 10**exponent * found.reshape(-1, 1)

    assert (apart(Net(weighed)) > 0) == of_all


def test_what_only_the_users_data_shows_is_found_there() -> None:
    class OfPixels(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            within = bool(((input >= 0) & (input <= 1)).all())
            return input.flatten(1) * (1 + 1e-3 * input.mean() if within else 1)

    assert apart(OfPixels()) == 0
    assert apart(OfPixels(), real=True) > 0


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_a_fixed_batch_is_measured_where_it_holds_several(batch: int) -> None:
    class Fixed(Net):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).reshape(batch if batch < 9 else len(input), 8)

    assert (apart(Fixed(MEETING["strong mean"]), batch=batch) > 0) == (batch > 1)
    assert apart(Fixed(nn.Identity()), batch=batch) == 0
