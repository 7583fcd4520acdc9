"""Constant kernels, however they are computed, are stored bit for bit; any other is refused by name."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gmconv
from gmconv.constants import bake_constants, bake_for_inputs, bake_network
from gmconv.errors import BakeError
from gmconv.inputs import Input
from tests.gmconv.constants import calls, dynamic, generated, layers
from tests.gmconv.constants.layers import Base, gauss, net

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
Layer = Callable[[int, int], nn.Module]


def image(batch: int = 2, size: int = 16) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("layer", [*layers.MASKS, *generated.GENERATED, *calls.CALLS], ids=lambda layer: layer.__name__)
def test_a_constant_kernel_is_stored_bit_for_bit(layer: Layer) -> None:
    model = net(layer)
    baked, certificates = bake_constants(model, image())
    assert len(certificates) >= 2
    assert all(c.kind != "kept" and c.sha256 and c.name.startswith(("a", "b", "Base")) for c in certificates)
    with torch.no_grad():
        assert torch.equal(baked(image(3)), model(image(3)))
        again, found = bake_constants(baked, image())
        assert not found, "nothing is left to bake"
        assert torch.equal(again(image(3)), model(image(3)))


@pytest.mark.parametrize("layer", dynamic.DYNAMIC, ids=lambda layer: layer.__name__)
def test_a_kernel_that_varies_is_refused_by_name(layer: Layer) -> None:
    with pytest.raises(BakeError, match=r"^layer 'a' \(" + layer.__name__):
        bake_constants(net(layer), image())


def test_a_kernel_that_varies_can_be_kept() -> None:
    model = net(dynamic.CondConv)
    model.b = Base(16, 16)
    baked, certificates = bake_constants(model, image(), dynamic="keep")
    assert [(c.name, c.kind) for c in certificates] == [("a", "kept"), ("b", "mask")]
    assert certificates[0].reason == "its kernel is computed from the network's input"
    assert type(baked.a) is dynamic.CondConv
    assert type(baked.b) is nn.Conv2d


def test_a_module_that_is_one_call_becomes_the_plain_layer_in_place() -> None:
    model = net(Base)
    before, calls = model.a, []
    before.register_forward_hook(lambda *_: calls.append(1))
    baked, _ = bake_constants(model, image(), inplace=True)
    assert baked is model
    assert model.a is before
    assert type(before) is nn.Conv2d
    calls.clear()
    model(image())
    assert calls == [1], "hooks stay"


def test_a_forward_put_on_the_object_goes_on_saying_what_it_takes() -> None:
    model = net(Base)
    inner = model.forward
    model.forward = lambda image: inner(image) * 2
    baked, certificates = bake_constants(model, image())
    assert len(certificates) == 2
    assert list(inspect.signature(baked.forward).parameters) == ["image"]
    assert torch.equal(baked(image(3)), model(image(3)))


def test_an_index_by_position_decides_nothing_and_one_by_truth_does() -> None:
    class Picks(nn.Module):
        def __init__(self, by: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.first, self.a, self.by = nn.Conv2d(3, 3, 3), Base(3, 4), by

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x).mean((0, 2, 3))
            return self.a(x) * y[self.by(y)].sum()

    _, certificates = bake_constants(Picks(lambda y: torch.tensor([2, 0])).eval(), image())
    assert [c.kind for c in certificates] == ["mask"]
    with pytest.raises(BakeError, match=r"values of the input reach Python in the network itself \(index\)"):
        bake_constants(Picks(lambda y: y > 0).eval(), image())


def test_any_other_keeps_its_forward_and_gets_a_child() -> None:
    baked, certificates = bake_constants(net(calls.Block), image())
    assert [c.name for c in certificates] == ["a.baked_0", "a.baked_1", "b.baked_0", "b.baked_1"]
    assert type(baked.a.baked_0) is nn.Conv2d
    assert type(baked.a).__name__ == "Block"
    assert copy.deepcopy(baked)(image()).shape == (2, 10)


def test_a_layer_outside_of_the_module_tree_is_left_as_it_is() -> None:
    model = net(calls.Unregistered)
    baked, certificates = bake_constants(model, image(), inplace=True)
    assert baked is model
    assert type(model.a.layers[0]) is Base
    assert [(c.name, c.kind) for c in certificates] == [("Base_baked_0", "mask"), ("Base_1_baked_1", "mask")]
    assert type(model.Base_baked_0) is nn.Conv2d


def test_shared_kernels_stay_shared() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Base(3, 3), Base(3, 3)
            self.b.weight, self.b.sigma = self.a.weight, self.a.sigma

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    baked, _ = bake_constants(Shared().eval(), image())
    assert baked.a.weight is baked.b.weight


def test_the_argument_is_left_alone_and_so_it_is_when_a_layer_is_refused() -> None:
    model = net(Base)
    bake_constants(model, image())
    assert type(model.a) is Base
    model.b = dynamic.CondConv(16, 16)
    with pytest.raises(BakeError):
        bake_constants(model, image(), inplace=True)
    assert type(model.a) is Base


@pytest.mark.parametrize("sigma_per", ["layer", "channel"])
def test_gmconv_gives_what_bake_gives(sigma_per: str) -> None:
    model = gmconv.convert(net(lambda i, o: nn.Conv2d(i, o, 5, padding=2)), sigma=1.1, sigma_per=sigma_per)
    one, other = gmconv.bake(model).state_dict(), bake_constants(model, image()).model.state_dict()
    assert list(one) == list(other)
    assert all(torch.equal(one[key], other[key]) for key in one)
    first, second = (bake_network(copy.deepcopy(model), image())[1].sha256() for _ in range(2))
    assert first == second
    assert set(first) == {"stem.0", "a", "b"}


def test_a_plain_network_comes_back_as_it_was() -> None:
    model = net(lambda i, o: nn.Conv2d(i, o, 3, padding=1))
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    baked, certificates = bake_constants(model, image(), inplace=True)
    assert baked is model
    assert certificates == ()
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert len(runs) == 2, "two forwards, no more"
    assert "_gmconv_origin" not in next(model.parameters()).untyped_storage().__dict__


def test_another_size_must_give_the_same_kernel() -> None:
    class BySize(Base):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight * gauss(5, x.shape[-1] / 8), self.bias, padding=2)

    assert len(bake_constants(net(BySize), image()).certificates) == 2
    with pytest.raises(BakeError, match="layer 'a'.*follows the input's height and width"):
        bake_constants(net(BySize), image(), sizes=[(image(size=24),)])


class ByBatch(Base):
    """Another kernel from so many samples on, and for five."""

    def forward(self, x: Tensor) -> Tensor:
        width = 1.5 if len(x) > 20 or len(x) == 5 else 1.0
        return F.conv2d(x, self.weight * gauss(5, width), self.bias, padding=2)


def test_another_batch_must_give_the_same_kernel_unless_it_is_the_only_one() -> None:
    told = "layer 'a'.*two batches gave two kernels.*--batch N"
    with pytest.raises(BakeError, match=told):
        bake_constants(net(ByBatch), image(), sizes=[(image(batch=21),)])
    with pytest.raises(BakeError, match=told):
        bake_constants(net(ByBatch), image(batch=20))
    for batch in (5, 20):
        assert bake_constants(net(ByBatch), image(batch=batch), fixed_batch=True).certificates


def test_a_network_of_inputs_is_shown_small_and_large_batches() -> None:
    inputs = [Input("input", (3, 12, 12))]
    with pytest.raises(BakeError, match="two batches gave two kernels"):
        bake_for_inputs(net(ByBatch), inputs)
    assert bake_for_inputs(net(ByBatch), inputs, batch=4)[1].kernels


def test_large_batches_are_shown_only_to_a_network_that_computes_kernels() -> None:
    def shown(model: nn.Module) -> set[int]:
        sizes: set[int] = set()
        model.register_forward_pre_hook(lambda _, args: sizes.add(len(args[0])))
        with suppress(BakeError):
            bake_for_inputs(model, [Input("input", (3, 12, 12))], dynamic_hw=True)
        return sizes

    assert shown(nn.Sequential(nn.Conv2d(3, 4, 3)).eval()) == {2, 3}
    assert {5, 64} < shown(net(ByBatch))


def test_training_mode_scripts_and_threads_are_refused() -> None:
    with pytest.raises(BakeError, match="training mode"):
        bake_constants(net(Base).train(), image())
    with pytest.raises(BakeError, match="layer 'a' is TorchScript"):
        bake_constants(net(lambda i, o: torch.jit.script(nn.Conv2d(i, o, 3, padding=1))), image())

    class Started(Base):
        def forward(self, x: Tensor) -> Tensor:
            found: list[Tensor] = []
            thread = threading.Thread(target=lambda: found.append(super(Started, self).forward(x)))
            thread.start(), thread.join()
            return found[0]

    pool = ThreadPoolExecutor(1)
    pool.submit(int).result()  # its thread runs before anybody looks

    class Pooled(Base):
        def forward(self, x: Tensor) -> Tensor:
            return pool.submit(super().forward, x).result()

    for layer in (Started, Pooled):
        with pytest.raises(BakeError, match="layer 'a' runs in a thread"):
            bake_constants(net(layer), image())


def test_a_kernel_that_is_not_finite_is_refused() -> None:
    class Broken(Base):
        def kernel(self) -> Tensor:
            return self.weight / 0 * 0

    with pytest.raises(BakeError, match="layer 'a'.*NaN"):
        bake_constants(net(Broken), image())


def test_several_and_nested_inputs_and_whole_numbers() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.table = Base(3, 4), nn.Embedding(7, 4)

        def forward(self, images: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
            return {"out": self.conv(images["left"]) + self.table(index)[:, :, None, None]}

    baked, certificates = bake_constants(Two().eval(), {"left": image()}, torch.tensor([1, 6]))
    assert [c.name for c in certificates] == ["conv"]
    assert type(baked.conv) is nn.Conv2d


@pytest.mark.parametrize("layer", [calls.Unfolded, calls.UnfoldedRows, calls.Einsum], ids=lambda layer: layer.__name__)
def test_a_kernel_that_a_product_uses_is_the_mask_that_it_is(layer: Layer) -> None:
    baked, certificates = bake_constants(net(layer), image())
    assert [(c.name, c.kind) for c in certificates] == [("a.baked_0", "mask"), ("b.baked_0", "mask")]
    traced = torch.export.export(baked, (image(),)).module()
    with torch.no_grad():
        assert torch.equal(traced(image()), baked(image()))


def test_of_products_only_what_no_input_and_no_batch_changes_is_stored() -> None:
    _, certificates = bake_constants(net(calls.Tokens), image())
    assert [c.name for c in certificates] == ["a.baked_0", "a.baked_1", "b.baked_0", "b.baked_1"]


def test_a_forward_that_asks_a_constant_for_its_value_can_be_traced() -> None:
    baked, _ = bake_constants(net(calls.ItemBlock), image())
    traced = torch.export.export(baked, (image(),)).module()
    with torch.no_grad():
        assert torch.equal(traced(image()), baked(image()))
