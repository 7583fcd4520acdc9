"""What is said of a kernel: what it was made from, how, and which Gaussian its mask is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gmconv.certificate import tensor_sha256
from gmconv.constants import bake_constants
from gmconv.constants.gaussian import fit_gaussian
from gmconv.records import KernelCertificate
from tests.gmconv.constants import calls, generated, layers


def certificate(layer: type[nn.Module] | object, width: int = 4) -> tuple[KernelCertificate, nn.Module]:
    torch.manual_seed(1)
    model = nn.Sequential(layer(width, 2 * width)).eval()  # type: ignore[operator]
    found = bake_constants(model, torch.randn(2, width, 16, 16))
    return found.certificates[0], found.model


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("layer", "kind", "weight"),
    [
        (layers.Softplus, "mask", "0.weight"),
        (layers.Rotated, "mask", "0.weight"),
        (layers.PerInput, "mask per channel", "0.weight"),
        (layers.PerPair, "mask per channel", "0.weight"),
        (calls.Depthwise, "mask per channel", "0.weight"),
        (calls.OneD, "mask", "0.weight"),
        (calls.UnfoldedRows, "mask", "0.weight"),
        (generated.Supermask, "pruned", "0.weight"),
        (calls.Copied, "mask", "0.raw"),
        (calls.normed, "scale", "0.weight_v"),
        (calls.spectral, "scale", "0.parametrizations.weight.original"),
        (calls.pruned, "pruned", "0.weight_orig"),
        (generated.Standardized, "reparametrised", "0.weight"),
        (generated.Hyper, "generated", None),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_kind_and_origin(layer: object, kind: str, weight: str | None) -> None:
    found, baked = certificate(layer)
    assert (found.kind, found.weight) == (kind, weight)
    assert weight is None or weight in found.made_from
    assert found.sha256 == tensor_sha256(baked.get_submodule(found.name).weight)  # type: ignore[arg-type]
    assert (found.energy_removed is not None) == (kind.startswith("mask") or kind == "pruned")


def test_zero() -> None:
    class Dead(layers.Base):
        def kernel(self) -> Tensor:
            return self.weight * 0

    assert certificate(Dead)[0].kind == "zero"


def test_the_energy_removed_is_that_of_the_mask() -> None:
    found, baked = certificate(layers.Base)
    torch.manual_seed(1)
    live = layers.Base(4, 8)
    kernel = baked[0].weight
    expected = 1 - float(kernel.double().square().sum() / live.weight.double().square().sum())
    assert found.energy_removed == pytest.approx(expected, rel=1e-9)


def mask(k: tuple[int, int], sigma: tuple[float, float], centre: tuple[float, float], rho: float) -> Tensor:
    axes = [torch.arange(n, dtype=torch.float64) - (n - 1) / 2 - c for n, c in zip(k, centre, strict=True)]
    y, x = (a / s for a, s in zip(torch.meshgrid(*axes, indexing="ij"), sigma, strict=True))
    return torch.exp(-(y * y - 2 * rho * x * y + x * x) / (2 * (1 - rho * rho)))


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(3, 15), st.integers(3, 15)),
    st.tuples(st.floats(0.5, 20), st.floats(0.5, 20)),
    st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
    st.floats(-0.8, 0.8),
    st.floats(0.01, 100),
)
def test_an_exact_gaussian_is_found(
    k: tuple[int, int], sigma: tuple[float, float], centre: tuple[float, float], rho: float, peak: float
) -> None:
    weight = torch.randn(3, 5, *k, generator=torch.Generator().manual_seed(0))
    kernel = weight * (peak * mask(k, sigma, centre, rho)).float()
    fit = fit_gaussian((weight.double() * kernel).sum((0, 1))[None] / weight.double().square().sum((0, 1)))
    assert fit is not None
    assert fit.misfit <= 1e-6
    if max(sigma) < 3:  # a mask that is almost flat says little about its sigma in float32
        assert [s.median for s in fit.sigma if s] == pytest.approx(list(sigma), rel=1e-3)
        assert [c.median for c in fit.centre] == pytest.approx(list(centre), abs=1e-3)
        assert fit.correlation == pytest.approx(rho, abs=1e-3)


def test_flat_axes_narrow_masks_and_what_is_no_gaussian() -> None:
    flat = fit_gaussian(mask((5, 5), (1.0, 1e9), (0, 0), 0)[None])
    assert flat is not None
    assert flat.sigma[1] is None
    narrow = fit_gaussian(mask((3, 3), (0.1, 0.1), (0, 0), 0)[None])
    assert narrow is not None
    assert [s.max for s in narrow.sigma if s] == pytest.approx([0.1, 0.1])
    assert fit_gaussian(torch.rand(2, 5, 5, dtype=torch.float64)) is None
    assert fit_gaussian(torch.ones(1, 5, 5, dtype=torch.float64)) is None
    assert fit_gaussian(torch.ones(4, 1, 1, dtype=torch.float64)) is None
    ranged = fit_gaussian(torch.stack([mask((7, 7), (s, s), (0, 0), 0) for s in (0.8, 1.0, 1.6)]))
    assert ranged is not None
    assert math.isclose(ranged.sigma[0].max, 1.6, rel_tol=1e-6)  # type: ignore[union-attr]
