import pytest
import torch
from torch import nn

from gmconv import GMConv2d
from gmconv.erf import effective_receptive_field, plain_twin, receptive_fields, without_masks
from gmconv.errors import RefusedError


class Linear2(nn.Module):
    """Two convolutions without a nonlinearity: the field is the convolution of the kernels, known exactly."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.a = GMConv2d(1, 1, 3, padding=1, bias=False, sigma=sigma)
        self.b = GMConv2d(1, 1, 3, padding=1, bias=False, sigma=sigma)
        for layer in (self.a, self.b):
            nn.init.constant_(layer.weight, 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)).mean((2, 3))


def test_the_field_of_two_linear_layers_is_the_product_of_their_kernels() -> None:
    model = Linear2(1.0).eval()
    field = effective_receptive_field(model, (1, 9, 9), samples=2)
    mask = model.a.mask()[0, 0].double()
    wanted = torch.zeros(9, 9, dtype=torch.float64)
    full = nn.functional.conv2d(mask[None, None], mask.flip(0, 1)[None, None], padding=2)[0, 0]
    wanted[2:7, 2:7] = full
    torch.testing.assert_close(field, wanted, rtol=1e-5, atol=1e-7)


def test_without_masks_the_field_is_that_of_the_bare_weights() -> None:
    model = Linear2(0.6).eval()
    bare = effective_receptive_field(without_masks(model), (1, 9, 9), samples=1)
    counts = torch.tensor([1.0, 2, 3, 2, 1], dtype=torch.float64)
    torch.testing.assert_close(bare[2:7, 2:7], counts[:, None] * counts[None], rtol=1e-6, atol=0)
    assert float(model.a.sigma.detach()) == pytest.approx(0.6), "the model itself is not changed"


def test_a_plain_twins_kernels_are_as_large_as_they_were_under_their_masks() -> None:
    """And keep their shape; weights that two layers share are scaled once, and a channel of zeros stays one."""
    torch.manual_seed(0)
    model = nn.Sequential(*(GMConv2d(4, 4, 7, sigma=0.8, sigma_per="channel") for _ in range(3))).eval()
    model[2].weight = model[1].weight
    with torch.no_grad():
        model[0].weight[3] = 0
    before = {key: value.clone() for key, value in model.state_dict().items()}
    twin = plain_twin(model)
    for live, plain in zip(model[:2], twin[:2], strict=True):
        assert torch.equal(plain.baked_weight(), plain.weight), "no mask is left"
        sizes = [kernel.detach().abs().sum((1, 2, 3)) for kernel in (live.baked_weight(), plain.weight)]
        torch.testing.assert_close(*sizes)
        ratio = (plain.weight / live.weight).detach()[live.weight.detach().abs().sum((1, 2, 3)) > 0]
        torch.testing.assert_close(ratio, ratio[:, :1, :1, :1].expand_as(ratio))
        assert float(ratio.max()) < 0.5
    assert twin[2].weight is twin[1].weight
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_small_sigma_narrows_the_field() -> None:
    def spread(field: torch.Tensor) -> float:
        ring = torch.hypot(*torch.meshgrid(torch.arange(9.0) - 4, torch.arange(9.0) - 4, indexing="ij"))
        return float((field * ring).sum() / field.sum())

    found = receptive_fields(Linear2(0.6).eval(), (1, 9, 9), samples=1)
    assert spread(found.after) < 0.7 * spread(found.before)


def test_same_seed_same_field_and_the_mode_is_left_alone() -> None:
    model = nn.Sequential(GMConv2d(3, 4, 3, padding=1, sigma=1.0), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    first, second = (effective_receptive_field(model, (3, 8, 8), samples=3, seed=5) for _ in range(2))
    assert torch.equal(first, second)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert first.shape == (8, 8)


def test_a_network_without_a_feature_map_is_an_error() -> None:
    with pytest.raises(RefusedError, match="no convolution"):
        effective_receptive_field(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), (3, 2, 2))
