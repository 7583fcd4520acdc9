"""convert puts masks on any network and bake takes them off, bit for bit, whatever else points at the layers."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel

import gmconv
from gmconv import GMConv2d
from gmconv.errors import BakeError, SurgeryError
from gmconv.surgery import masked_layers, network_within


@pytest.mark.parametrize("given", ["net.pth", {}, nn.ReLU, None], ids=lambda given: type(given).__name__)
@pytest.mark.parametrize("function", ["convert", "bake", "bake_constants", "crop", "deploy", "save_golden"])
def test_what_is_no_network_is_refused_in_one_sentence(function: str, given: object) -> None:
    more = {
        "deploy": (torch.zeros(1),),
        "save_golden": ([torch.zeros(1)], "g.npz"),
        "bake_constants": (torch.zeros(1),),
    }
    what = f"{function} takes the network itself, a torch.nn.Module, and got "
    with pytest.raises(TypeError, match=what + ("the class ReLU" if given is nn.ReLU else f"a {type(given).__name__}")):
        getattr(gmconv, function)(given, *more.get(function, ()))


class Shared(nn.Module):
    """One convolution used under two names, and one in a plain list that no module tree knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.again = self.first
        self.point = nn.Conv2d(4, 4, 1)
        self.off_the_books = [self.first]

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.point(self.again(self.off_the_books[0](x)))
        return output


class Odd(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Quiet(nn.Conv2d):
    """A subclass that changes nothing about how it computes."""


class InputDependent(GMConv2d):
    def forward(self, input: Tensor) -> Tensor:
        scale = input.abs().mean()
        return self._conv_forward(input, self.weight * self.mask() * scale, self.bias)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 5, groups=2)))


def randomize_sigmas(model: nn.Module) -> None:
    for layer in masked_layers(model).values():
        nn.init.uniform_(layer.sigma, 0.3, 3)


def test_masks_every_convolution_but_1x1_and_changes_a_copy() -> None:
    plain = Shared()
    masked = gmconv.convert(plain, sigma=1.5)
    assert list(masked_layers(masked)) == ["first"]
    assert type(masked.point) is nn.Conv2d
    assert type(plain.first) is nn.Conv2d
    assert masked.first.sigma.item() == 1.5
    assert torch.equal(masked.first.weight, plain.first.weight)


def test_inplace_changes_the_model_itself() -> None:
    plain = Shared()
    conv = plain.first
    assert gmconv.convert(plain, inplace=True) is plain
    assert plain.first is conv
    assert isinstance(conv, GMConv2d)


def test_where_decides_for_every_convolution() -> None:
    model = gmconv.convert(Shared(), where=lambda name, conv: conv.kernel_size == (1, 1))
    assert list(masked_layers(model)) == ["point"]


def test_shared_layers_stay_shared_and_plain_lists_stay_right() -> None:
    for model in (gmconv.convert(Shared()), gmconv.bake(gmconv.convert(Shared()))):
        assert model.first is model.again
        assert model.off_the_books[0] is model.first


def test_bake_is_bitwise_for_the_whole_network() -> None:
    model = gmconv.convert(network(), sigma_per="channel").eval()
    randomize_sigmas(model)
    x = torch.randn(3, 3, 12, 12)
    baked = gmconv.bake(model)
    assert torch.equal(baked(x), model(x))
    for name, layer in masked_layers(model).items():
        assert torch.equal(baked.get_submodule(name).weight, layer.weight * layer.mask())


def test_nothing_of_gmconv_remains_after_baking() -> None:
    baked = gmconv.bake(gmconv.convert(network()))
    assert [type(m) for m in baked.modules()] == [type(m) for m in network().modules()]
    assert list(baked.state_dict()) == list(network().state_dict())
    assert not any("sigma" in vars(m) or "sigma_per" in vars(m) for m in baked.modules())


def test_bake_leaves_the_live_model_alone_unless_inplace() -> None:
    model = gmconv.convert(network())
    gmconv.bake(model)
    assert len(masked_layers(model)) == 2
    gmconv.bake(model, inplace=True)
    assert not masked_layers(model)


def test_layers_with_one_weight_and_one_sigma_go_on_sharing_the_product() -> None:
    model = nn.ModuleList([GMConv2d(2, 2, 3), GMConv2d(2, 2, 3), GMConv2d(2, 2, 3)])
    model[1].weight, model[1].sigma = model[0].weight, model[0].sigma
    model[2].weight = model[0].weight
    model[2].sigma.data.fill_(0.4)
    baked = gmconv.bake(model)
    assert baked[0].weight is baked[1].weight
    assert baked[2].weight is not baked[0].weight
    assert torch.equal(baked[2].weight, model[2].baked_weight())
    assert torch.equal(baked[0].weight, model[0].baked_weight())


def test_keeps_hooks_mode_device_dtype_and_requires_grad() -> None:
    model = network().to(torch.bfloat16)
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("hook"))
    model[0].eval()
    model[0].weight.requires_grad_(False)
    converted = gmconv.convert(model, inplace=True)
    baked = gmconv.bake(converted, inplace=True)
    baked(torch.randn(1, 3, 12, 12, dtype=torch.bfloat16))
    assert calls == ["hook"]
    assert not baked[0].training
    assert baked[2].training
    assert baked[0].weight.dtype == torch.bfloat16
    assert not baked[0].weight.requires_grad


def test_works_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = gmconv.convert(network())
    assert model[0].sigma.is_meta


def test_works_on_a_bare_convolution() -> None:
    layer = gmconv.convert(nn.Conv2d(3, 4, 3))
    assert isinstance(layer, GMConv2d)
    assert type(gmconv.bake(layer)) is nn.Conv2d


def test_a_subclass_with_its_own_forward_is_refused_by_name() -> None:
    model = nn.Sequential(nn.ReLU(), Odd(3, 4, 3))
    with pytest.raises(SurgeryError, match=r"layer '1' is an Odd, a Conv2d with a forward of its own"):
        gmconv.convert(model)


def test_a_subclass_with_its_own_forward_can_be_skipped_or_replaced() -> None:
    model = nn.Sequential(Odd(3, 4, 3), Quiet(4, 4, 3))
    assert list(masked_layers(gmconv.convert(model, subclasses="skip"))) == ["1"]
    assert list(masked_layers(gmconv.convert(model, subclasses="replace"))) == ["0", "1"]


def test_a_forward_patched_on_the_instance_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model[0].forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(SurgeryError, match="layer '0'"):
        gmconv.convert(model)


def computed_weight(kind: str, layer: nn.Module) -> nn.Module:
    if kind == "weight_norm":
        return parametrizations.weight_norm(layer)
    if kind == "spectral_norm":
        return nn.utils.spectral_norm(layer)
    if kind == "pruned":
        return prune.random_unstructured(layer, "weight", 0.5)  # type: ignore[no-untyped-call, no-any-return]
    return parametrize.register_parametrization(layer, "weight", nn.Identity())


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "pruned", "parametrized"])
@pytest.mark.parametrize("step", ["convert", "bake"])
def test_a_computed_weight_is_refused_by_name(kind: str, step: str) -> None:
    layer = nn.Conv2d(3, 4, 3) if step == "convert" else GMConv2d(3, 4, 3)
    model = nn.Sequential(computed_weight(kind, layer))
    with pytest.raises(SurgeryError, match="layer '0'"):
        gmconv.convert(model) if step == "convert" else gmconv.bake(model)


def test_a_lazy_layer_is_refused() -> None:
    with pytest.raises(SurgeryError, match="layer '0' is lazy"):
        gmconv.convert(nn.Sequential(nn.LazyConv2d(4, 3)))


@pytest.mark.parametrize("step", [gmconv.convert, gmconv.bake, lambda model: gmconv.crop(model, 1e-3)])
def test_torchscript_is_refused(step: Callable[[Any], object]) -> None:
    masked = gmconv.convert(nn.Sequential(nn.Conv2d(3, 4, 3)))
    traced: Any = torch.jit.trace(masked, torch.randn(1, 3, 6, 6))
    with pytest.raises(SurgeryError, match="the network itself is TorchScript"):
        step(traced)
    with pytest.raises(SurgeryError, match=r"layer '0(\.0)?' is TorchScript"):
        step(nn.Sequential(traced))


class Teacher(nn.Conv2d):
    def __deepcopy__(self, memo: object) -> Teacher:
        return self


@pytest.mark.parametrize("step", [gmconv.convert, lambda model: gmconv.crop(model, 1e-3)])
def test_what_cannot_be_copied_is_refused_before_it_is_changed(step: Callable[[Any], object]) -> None:
    held = nn.Sequential(nn.Conv2d(3, 4, 3))
    held.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(SurgeryError, match=r"cannot be copied \(cannot pickle '_thread.lock' object\)"):
        step(held)
    with pytest.raises(SurgeryError, match="layer '1' is its own copy"):
        step(nn.Sequential(nn.Conv2d(3, 4, 3), Teacher(4, 4, 3)))
    with torch.device("meta"), pytest.raises(BakeError, match="its sigma is on the meta device and has no values"):
        gmconv.bake(gmconv.convert(nn.Sequential(nn.Conv2d(3, 4, 3))))


def test_masks_beside_a_part_in_torchscript_are_baked() -> None:
    live = nn.Sequential(gmconv.convert(nn.Conv2d(3, 4, 3)), torch.jit.script(nn.ReLU6())).eval()
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(gmconv.bake(live)(x), live(x))


def test_a_mask_that_depends_on_the_input_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Sequential(InputDependent(3, 4, 3)))
    with pytest.raises(BakeError, match=r"layer '0\.0' is an InputDependent"):
        gmconv.bake(model)


def test_a_foreign_mask_is_refused_rather_than_left_in() -> None:
    class ForeignGMConv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sigma = nn.Parameter(torch.ones(1))

    with pytest.raises(BakeError, match=r"not a gmconv.GMConv2d: .*gmconv\.bake_constants"):
        gmconv.bake(nn.Sequential(ForeignGMConv()))


def test_a_network_in_which_nothing_is_baked_is_no_silent_success() -> None:
    with pytest.warns(UserWarning, match=r"nothing was baked: .*gmconv\.bake_constants"):
        gmconv.bake(nn.Sequential(nn.Conv2d(3, 4, 3)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["sigma", "weight"])
def test_nan_and_inf_are_refused_by_layer(part: str, value: float) -> None:
    model = nn.Sequential(GMConv2d(3, 4, 3))
    getattr(model[0], part).data.view(-1)[0] = value
    with pytest.raises(BakeError, match=f"layer '0': its {part} holds NaN or Inf"):
        gmconv.bake(model)


def test_a_refused_conversion_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Odd(4, 4, 3))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SurgeryError):
        gmconv.convert(model, inplace=True)
    assert type(model[0]) is nn.Conv2d
    assert list(model.state_dict()) == list(before)


def test_the_network_within_is_that_of_wrappers_that_hand_on_what_they_are_given() -> None:
    class DataParallel(nn.Module):  # a user's own, which may do anything
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Identity()

    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    assert network_within(torch.compile(nn.DataParallel(torch.compile(net)))) is net
    assert isinstance(network_within(AveragedModel(nn.DataParallel(net))), nn.Sequential)
    own = DataParallel()
    assert network_within(own) is own
