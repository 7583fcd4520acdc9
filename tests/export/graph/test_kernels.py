"""The exported program itself says whether a convolution reads a stored kernel; no baking is believed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.nn import functional as F

import gmconv
from export.graph.kernels import require_stored_kernels
from gmconv.constants import bake_constants
from gmconv.errors import RefusedError
from tests.gmconv.constants import calls, dynamic, generated, layers


def program(model: nn.Module, *, free: bool = True) -> torch.export.ExportedProgram:
    axes = ({0: Dim.DYNAMIC},) if free else None
    return export(model, (torch.randn(2, 3, 16, 16),), dynamic_shapes=axes).run_decompositions({})


@pytest.mark.parametrize(
    "layer",
    [layers.Base, layers.Rotated, generated.HyperConv, calls.Block, calls.FunctionalCall],
    ids=lambda layer: layer.__name__,
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_before_baking_the_layer_is_named_and_afterwards_there_is_nothing_to_say(layer: type[nn.Module]) -> None:
    model = layers.net(layer)
    with pytest.raises(RefusedError, match="layer 'a.*in the graph"):
        require_stored_kernels(program(copy.deepcopy(model)))
    require_stored_kernels(program(bake_constants(model, torch.randn(2, 3, 16, 16)).model))


def test_gmconv_unbaked_is_named() -> None:
    model = gmconv.convert(layers.net(lambda i, o: nn.Conv2d(i, o, 5, padding=2)))
    with pytest.raises(RefusedError, match="layer 'stem.0' computes its kernel in the graph"):
        require_stored_kernels(program(model))
    require_stored_kernels(program(gmconv.bake(model)))


def test_a_kernel_from_the_input_is_named_unless_it_is_kept() -> None:
    found = program(layers.net(dynamic.Modulated))
    with pytest.raises(RefusedError, match="layer 'a' computes its kernel from the network's input"):
        require_stored_kernels(found)
    with pytest.raises(RefusedError, match="layer 'b'"):
        require_stored_kernels(found, {"a"})
    require_stored_kernels(found, {"a", "b"})


def test_a_kernel_inside_a_branch_is_seen() -> None:
    class Branch(layers.Base):
        def forward(self, x: Tensor) -> Tensor:
            def doubled(x: Tensor, w: Tensor) -> Tensor:
                return F.conv2d(x, w * 2, padding=2).mean((2, 3))

            def plain(x: Tensor, w: Tensor) -> Tensor:
                return F.conv2d(x, w, padding=2).mean((2, 3))

            return torch.cond(x.sum() > 0, doubled, plain, (x, self.weight))

    torch._dynamo.reset()  # what it traced before makes sizes symbolic
    with pytest.raises(RefusedError, match="layer '0"):
        require_stored_kernels(program(nn.Sequential(Branch(3, 4)), free=False))


def test_stored_kernels_may_be_moved_about() -> None:
    class Views(layers.Base):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight.transpose(2, 3).reshape_as(self.weight), padding=2)

    require_stored_kernels(program(layers.net(Views)))
