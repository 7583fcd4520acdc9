"""GMConv2d behaves as nn.Conv2d does, with a masked kernel, wherever nn.Conv2d can be used."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import gmconv
from gmconv import GMConv2d


@st.composite
def layer_arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Valid keyword arguments of nn.Conv2d, and the two of GMConv2d."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = draw(st.one_of(st.integers(1, 5), st.tuples(st.integers(1, 5), st.integers(1, 5))))
    stride = draw(st.integers(1, 3))
    paddings = [st.integers(0, 2), st.tuples(st.integers(0, 2), st.integers(0, 2)), st.just("valid")]
    if stride == 1:
        paddings.append(st.just("same"))
    return {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 2)),
        "kernel_size": kernel,
        "stride": stride,
        "padding": draw(st.one_of(paddings)),
        "dilation": draw(st.integers(1, 2)),
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        "sigma": draw(st.floats(0.1, 6)),
        "sigma_per": draw(st.sampled_from(["layer", "channel"])),
    }


@settings(deadline=None, max_examples=60)
@given(layer_arguments())
def test_is_a_convolution_with_the_product_of_weight_and_mask(arguments: dict[str, Any]) -> None:
    layer = GMConv2d(**arguments)
    plain = nn.Conv2d(**{k: v for k, v in arguments.items() if not k.startswith("sigma")})
    size = (layer.kernel_size[0], layer.kernel_size[1])
    product = layer.weight * gmconv.gaussian_mask(size, arguments["sigma"])
    plain.load_state_dict({"weight": product} | ({} if layer.bias is None else {"bias": layer.bias}))
    x = torch.randn(2, layer.in_channels, 13, 12)
    assert torch.equal(layer(x), plain(x))


def test_a_conv2d_state_dict_loads_with_only_sigma_missing() -> None:
    result = GMConv2d(3, 4, 3).load_state_dict(nn.Conv2d(3, 4, 3).state_dict(), strict=False)
    assert result.missing_keys == ["sigma"]
    assert result.unexpected_keys == []


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1)])
def test_loads_a_foreign_sigma_whatever_its_shape(shape: tuple[int, ...]) -> None:
    layer = GMConv2d(3, 4, 3)
    layer.load_state_dict({**nn.Conv2d(3, 4, 3).state_dict(), "sigma": torch.full(shape, 0.7)})
    assert layer.sigma.item() == pytest.approx(0.7)
    assert layer.sigma.shape == (1,)


def test_repr_shows_sigma() -> None:
    assert "sigma=1.5, sigma_per=layer" in repr(GMConv2d(3, 4, 3, sigma=1.5))
    layer = GMConv2d(3, 2, 3, sigma_per="channel")
    layer.sigma.data = torch.tensor([0.5, 2.0])
    assert "sigma=[0.5..2], sigma_per=channel" in repr(layer)
    assert "sigma=meta" in repr(GMConv2d(3, 4, 3, device="meta"))


def test_refuses_another_sigma_per() -> None:
    with pytest.raises(ValueError, match="sigma_per must be 'layer' or 'channel', not 'tap'"):
        GMConv2d(3, 4, 3, sigma_per="tap")  # type: ignore[arg-type]


def test_gradients_are_right_in_float64() -> None:
    layer = GMConv2d(2, 3, 3, padding=1, sigma=0.8, sigma_per="channel", dtype=torch.float64)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        state = {"weight": weight, "bias": bias, "sigma": sigma}
        output: torch.Tensor = torch.func.functional_call(layer, state, (x,))
        return output

    assert torch.autograd.gradcheck(run, (x, layer.weight, layer.bias, layer.sigma))


def test_training_moves_sigma() -> None:
    layer = GMConv2d(1, 1, 5, padding=2, sigma=2.0)
    layer(torch.randn(4, 1, 8, 8)).square().mean().backward()
    assert layer.sigma.grad is not None
    assert layer.sigma.grad.abs() > 0


def test_compiles_in_one_graph() -> None:
    layer, x = GMConv2d(2, 3, 3), torch.randn(1, 2, 6, 6)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_autocast() -> None:
    layer, x = GMConv2d(2, 3, 3), torch.randn(1, 2, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), layer(x), rtol=0.05, atol=0.05)


def test_channels_last_survives_masking_and_baking() -> None:
    layer = GMConv2d(8, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert layer.baked_weight().is_contiguous(memory_format=torch.channels_last)
    assert gmconv.bake(layer).weight.is_contiguous(memory_format=torch.channels_last)


def test_copies_and_pickles() -> None:
    layer, x = GMConv2d(2, 3, 3, sigma=0.7, sigma_per="channel"), torch.randn(1, 2, 6, 6)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for twin in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),  # noqa: S301 (our own bytes)
        torch.load(stream, weights_only=False),
    ):
        assert torch.equal(twin(x), layer(x))
        assert twin.sigma_per == "channel"


def test_unbatched_input_and_half_precision() -> None:
    layer = GMConv2d(2, 3, 3, sigma=0.9)
    assert layer(torch.randn(2, 6, 6)).shape == (3, 4, 4)
    assert copy.deepcopy(layer).to(torch.bfloat16).baked_weight().dtype == torch.bfloat16


DATA_PARALLEL = """
import os
import torch
import torch.distributed as dist
from gmconv import GMConv2d

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
wrapped = torch.nn.parallel.DistributedDataParallel(GMConv2d(2, 3, 3))
wrapped(torch.randn(2, 2, 6, 6)).sum().backward()
os._exit(0 if wrapped.module.sigma.grad is not None else 4)
"""


def test_data_parallel_gradients_reach_sigma() -> None:
    """In a process that ends without tearing gloo down: freeing it joins threads which may wait for the interpreter."""
    assert subprocess.run([sys.executable, "-c", DATA_PARALLEL], timeout=120).returncode == 0


def test_flat_mask_is_the_plain_convolution() -> None:
    layer = GMConv2d(2, 3, 3, sigma=float("inf"))
    x = torch.randn(1, 2, 6, 6)
    assert torch.equal(layer(x), functional.conv2d(x, layer.weight, layer.bias))
