"""`crop` removes taps and nothing else: same output as with these taps set to zero, same shape, same alignment."""

import copy
import math
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from gmconv import models
from gmconv.cropping.choose import choose_windows, crop, crop_alike, crop_to, parse_tolerance
from gmconv.cropping.layers import CroppedConv2d
from gmconv.cropping.window import Window, centred_windows, nested_windows, removed_share, smallest_window, zero_taps
from gmconv.errors import SurgeryError
from gmconv.layer import GMConv2d
from gmconv.surgery import bake, convert

SIZES = st.integers(1, 7)
SMALL = st.integers(1, 3)


@st.composite
def layer_arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Any arguments of `nn.Conv2d`: non-square, even, "same", "valid", every padding mode, groups, dilation."""
    groups = draw(SMALL)
    kernel = (draw(SIZES), draw(SIZES))
    padding: Any = draw(st.one_of(st.sampled_from(["same", "valid"]), st.tuples(st.integers(0, 5), st.integers(0, 5))))
    return {
        "in_channels": groups * draw(SMALL),
        "out_channels": groups * draw(SMALL),
        "kernel_size": kernel,
        "stride": 1 if padding == "same" else (draw(SMALL), draw(SMALL)),
        "padding": padding,
        "dilation": (draw(SMALL), draw(SMALL)),
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    }


@st.composite
def windows_of(draw: st.DrawFn, kernel: tuple[int, int]) -> Window:
    """Any window inside the kernel, centred or not."""
    height, width = draw(st.integers(1, kernel[0])), draw(st.integers(1, kernel[1]))
    return Window(draw(st.integers(0, kernel[0] - height)), draw(st.integers(0, kernel[1] - width)), height, width)


def zeroed(conv: nn.Conv2d, window: Window) -> nn.Conv2d:
    """`conv` with the taps outside `window` set to zero."""
    other = copy.deepcopy(conv)
    with torch.no_grad():
        other.weight -= window.removed(other.weight)
    return other


def run_or_skip(conv: nn.Module, x: Tensor) -> Tensor:
    """The layer's output; inputs that the uncropped layer itself refuses (too small to reflect) are not examples."""
    try:
        with torch.no_grad():
            out: Tensor = conv(x)
    except RuntimeError:
        assume(False)
    return out


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13 * (1 + scale))


@given(data=st.data())
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_a_cropped_layer_computes_what_zeroed_taps_compute(data: st.DataObject) -> None:
    arguments = data.draw(layer_arguments())
    window = data.draw(windows_of(arguments["kernel_size"]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    conv = nn.Conv2d(**arguments).double()
    shape = (conv.in_channels, data.draw(st.integers(5, 16)), data.draw(st.integers(5, 16)))
    x = torch.randn(shape if data.draw(st.booleans()) else (2, *shape), dtype=torch.float64)
    expected = run_or_skip(zeroed(conv, window), x)

    cropped = crop_to(nn.Sequential(conv), {} if arguments["kernel_size"] == (1, 1) else {"0": window})[0]

    assert_same(run_or_skip(cropped, x), expected)
    assert cropped.kernel_size == (window.height, window.width) == tuple(cropped.weight.shape[-2:])
    again = crop_to(nn.Sequential(cropped), {"0": Window(0, 0, 1, 1)})[0] if window.taps > 1 else cropped
    corner = Window(window.top, window.left, 1, 1)
    assert_same(run_or_skip(again, x), run_or_skip(zeroed(conv, corner), x) if window.taps > 1 else expected)


@given(
    arguments=layer_arguments(),
    sigma=st.floats(0.05, 4),
    per=st.sampled_from(["layer", "channel"]),
    tolerance=st.one_of(st.just("lossless"), st.floats(1e-9, 0.5)),
)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_crop_after_bake_is_bake_with_the_removed_taps_zero(
    arguments: dict[str, Any], sigma: float, per: Any, tolerance: Any
) -> None:
    torch.manual_seed(0)
    live = nn.Sequential(GMConv2d(**arguments, sigma=sigma, sigma_per=per).double())
    baked = bake(live)
    x = torch.randn(2, baked[0].in_channels, 13, 11, dtype=torch.float64)
    assume(arguments["kernel_size"] != (1, 1))
    window = choose_windows(baked, tolerance)["0"]
    expected = run_or_skip(zeroed(baked[0], window), x)

    cropped = crop(baked, tolerance)

    assert_same(run_or_skip(cropped, x), expected)
    # nn.Conv2d states every window but one off the centre, or one that reaches beyond the padding.
    if type(cropped[0]) is CroppedConv2d:
        left, right, top, bottom = cropped[0].pads
        assert (left, top) != (right, bottom) or min(left, top) < 0
    share = removed_share(baked[0].weight, window)
    assert share < 1e-35 if tolerance == "lossless" else share <= tolerance  # float64 taps, zero in fp32
    reach = live[0].weight.new_tensor(float(x.abs().max()))
    norm = baked[0].weight.detach().abs().sum((1, 2, 3)).max()
    moved = (run_or_skip(cropped, x) - run_or_skip(baked, x)).abs().max()
    assert moved <= share * norm * reach + 1e-12


@given(kernel=st.tuples(SIZES, SIZES), tolerance=st.floats(0, 0.6), seed=st.integers(0, 50))
def test_the_window_is_the_smallest_one_that_holds(kernel: tuple[int, int], tolerance: float, seed: int) -> None:
    weight = torch.rand(3, 2, *kernel, generator=torch.Generator().manual_seed(seed)) ** 8
    chosen = smallest_window(weight, tolerance)
    assert removed_share(weight, chosen) <= tolerance
    sizes = centred_windows(kernel)
    assert chosen.size in [window.size for window in sizes]
    centred = chosen in sizes
    for window in sizes:
        places = [
            Window(top, left, *window.size)
            for top in range(kernel[0] - window.height + 1)
            for left in range(kernel[1] - window.width + 1)
        ]
        for place in places:
            assert place.taps >= chosen.taps or removed_share(weight, place) > tolerance
        assert centred or window.taps > chosen.taps or removed_share(weight, window) > tolerance


def test_a_mask_with_a_centre_of_its_own_is_cropped_around_it() -> None:
    weight = torch.randn(4, 3, 15, 15, generator=torch.Generator().manual_seed(0))
    axis = torch.arange(15.0) - 7
    weight *= torch.exp(-((axis[:, None] - 2) ** 2 + (axis[None] + 1) ** 2) / 2)
    window = smallest_window(weight, 1e-3)
    assert window == Window(6, 3, 7, 7)
    conv = nn.Conv2d(3, 4, 15, padding=7)
    conv.weight = nn.Parameter(weight)
    cropped = crop(nn.Sequential(conv), 1e-3)
    image = torch.randn(1, 3, 20, 20)
    torch.testing.assert_close(cropped(image), conv(image), atol=1e-2, rtol=0)
    assert cropped[0].kernel_size == (7, 7)


@given(kernel=st.tuples(SIZES, SIZES), shift=st.tuples(st.integers(-3, 3), st.integers(-3, 3)))
def test_nested_windows_close_in_on_their_centre(kernel: tuple[int, int], shift: tuple[int, int]) -> None:
    shift = tuple(max(-((k - 1) // 2), min((k - 1) // 2, s)) for k, s in zip(kernel, shift, strict=True))  # type: ignore[assignment]
    windows = nested_windows(torch.randn(2, 3, *kernel, generator=torch.Generator().manual_seed(0)), shift)
    assert windows[0] == Window.whole(kernel)
    for outer, inner in pairwise(windows):
        assert outer.intersection(inner) == inner != outer
    last = windows[-1]
    assert (last.height, last.width) == tuple(2 - k % 2 for k in kernel)
    assert (last.top - (kernel[0] - 1) // 2, last.left - (kernel[1] - 1) // 2) == shift


def gaussian(high: float, wide: float, side: int = 7) -> torch.Tensor:
    """Random kernels (8, 4, side, side) under a mask of two sigmas."""
    axis = torch.arange(side) - (side - 1) / 2
    weight = torch.randn(8, 4, side, side, generator=torch.Generator().manual_seed(0))
    return weight * torch.exp(-(axis[:, None] ** 2) / (2 * high**2) - axis**2 / (2 * wide**2))


@pytest.mark.parametrize("sigma", [0.4, 1.0, 2.0, 1e3])
def test_nested_windows_of_a_round_mask_are_squares_and_what_lies_between(sigma: float) -> None:
    windows = nested_windows(gaussian(sigma, sigma))
    assert len(windows) == 7
    assert {w.size for w in windows} >= {(7, 7), (5, 5), (3, 3), (1, 1)}


def test_nested_windows_have_the_shape_of_the_mask() -> None:
    wide, high = gaussian(0.6, 1.2), gaussian(1.2, 0.6)
    assert [w.size for w in nested_windows(wide)][:4] == [(7, 7), (5, 7), (3, 7), (3, 5)]
    assert [w.size for w in nested_windows(high)][:4] == [(7, 7), (7, 5), (7, 3), (5, 3)]
    assert smallest_window(wide, 1e-3) in nested_windows(wide)
    row = torch.zeros(1, 1, 3, 7)
    row[0, 0, 1, 1:6] = 1
    sizes = [w.size for w in nested_windows(row)]
    assert sizes == [(3, 7), (3, 5), (1, 5), (1, 3), (1, 1)], "zeros first, the further out of equals"


def test_the_share_is_the_worst_channel_of_l1() -> None:
    weight = torch.zeros(3, 1, 3, 3)
    weight[:2, 0, 1, 1] = 1.0
    weight[0, 0, 0, 0] = 1.0  # half of the first channel is outside; the third channel is empty
    assert removed_share(weight, Window(1, 1, 1, 1)) == 0.5
    assert smallest_window(weight, 0.49) == Window(0, 0, 3, 3)
    assert smallest_window(weight, 0.5) == Window(1, 1, 1, 1)


def test_a_crop_within_the_padding_stays_a_plain_conv() -> None:
    conv = nn.Conv2d(2, 2, 7, stride=2, padding=3, dilation=1)
    cropped = crop_to(nn.Sequential(conv), {"0": Window(2, 2, 3, 3)})[0]
    assert type(cropped) is nn.Conv2d
    assert (cropped.kernel_size, cropped.padding, cropped.stride) == ((3, 3), (1, 1), (2, 2))


def test_a_kernel_that_shrinks_to_one_tap_becomes_pointwise() -> None:
    conv = nn.Conv2d(2, 2, 3, padding=2, dilation=2, padding_mode="reflect")
    cropped = crop_to(nn.Sequential(conv), {"0": Window(1, 1, 1, 1)})[0]
    assert type(cropped) is nn.Conv2d
    assert (cropped.kernel_size, cropped.padding, cropped.dilation) == ((1, 1), (0, 0), (1, 1))
    assert cropped.padding_mode == "zeros"  # nothing is padded: no Pad node in an export


def test_same_padding_of_an_even_kernel_stays_same() -> None:
    conv = nn.Conv2d(1, 1, 4, padding="same").double()
    cropped = crop_to(nn.Sequential(conv), {"0": Window(1, 1, 2, 2)})[0]
    assert type(cropped) is nn.Conv2d
    assert cropped.padding == "same"


def test_crop_keeps_the_model_it_was_given() -> None:
    model = bake(convert(nn.Sequential(nn.Conv2d(1, 2, 5, padding=2), nn.ReLU()), sigma=0.1))
    before = copy.deepcopy(model.state_dict())
    cropped = crop(model, "lossless")
    assert tuple(cropped[0].kernel_size) != (5, 5)
    assert model[0].kernel_size == (5, 5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert crop(model, "lossless", inplace=True) is model
    assert tuple(model[0].kernel_size) != (5, 5)


def test_hooks_sharing_format_and_state_survive() -> None:
    conv = nn.Conv2d(4, 4, 5, padding=2)
    model = nn.Sequential(conv, nn.ReLU(), conv).to(memory_format=torch.channels_last).half().eval()
    with torch.no_grad():
        conv.weight *= F.pad(torch.ones(1, 1, 3, 3), (1, 1, 1, 1)).half()
    conv.weight.requires_grad_(False)
    model[0].user_note = "kept"
    seen: list[int] = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    cropped = crop(model, 0.0)
    assert cropped[0] is cropped[2]
    assert cropped[0].kernel_size == (3, 3)
    assert cropped[0].user_note == "kept"
    assert cropped[0].weight.dtype == torch.float16
    assert not cropped[0].weight.requires_grad
    assert not cropped[0].training
    assert cropped[0].weight.is_contiguous(memory_format=torch.channels_last)
    cropped(torch.zeros(1, 4, 6, 6, dtype=torch.float16))
    assert len(seen) == 2


def test_tied_weights_stay_tied() -> None:
    a, b = nn.Conv2d(2, 2, 5, padding=2), nn.Conv2d(2, 2, 5, stride=2)
    b.weight = a.weight
    with torch.no_grad():
        a.weight -= Window(1, 1, 3, 3).removed(a.weight)
    cropped = crop(nn.Sequential(a, b), "lossless")
    assert cropped[0].weight is cropped[1].weight
    assert cropped[0].kernel_size == cropped[1].kernel_size == (3, 3)


def test_a_bare_convolution_is_a_model_too() -> None:
    conv = bake(GMConv2d(1, 1, 7, padding=3, sigma=0.15))
    cropped = crop(conv, "lossless")
    x = torch.randn(1, 1, 9, 9)
    assert cropped.kernel_size != (7, 7)
    torch.testing.assert_close(cropped(x), conv(x), rtol=0, atol=1e-6)


def test_subclasses_and_computed_weights_are_left_alone() -> None:
    class Other(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    computed = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 1, 3))
    model = nn.Sequential(Other(1, 1, 3), computed, nn.Conv2d(1, 1, 3))
    with torch.no_grad():
        for module in (model[0], model[2]):
            module.weight.zero_()
    assert list(choose_windows(model, "lossless")) == ["2"]
    assert crop(model, "lossless")[0].kernel_size == (3, 3)


def test_where_chooses_the_layers() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3))
    nn.init.ones_(model[1].weight)  # the centre tap holds a ninth of the norm
    cropped = crop(model, 0.99, where=lambda name, conv: name == "1")
    assert [tuple(m.kernel_size) for m in cropped] == [(3, 3), (1, 1)]


def test_layers_that_stay_in_fp32_lose_only_exact_zeros() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 5, padding=2), nn.Conv2d(2, 2, 5, padding=2))
    with torch.no_grad():
        for conv in model:
            conv.weight[..., (0, -1), :] *= 1e-9  # zero in fp16
            conv.weight[..., (0, -1)] *= 1e-9
    cropped = crop(model, "lossless", precision="fp16", fp32_layers=["1"])
    assert [conv.kernel_size for conv in cropped] == [(3, 3), (5, 5)]


def test_a_weight_without_values_is_refused_by_name() -> None:
    with pytest.raises(SurgeryError, match="'0'.*meta device"):
        crop(nn.Sequential(nn.Conv2d(1, 1, 3, device="meta")))


def test_a_live_model_is_refused_by_name() -> None:
    model = convert(nn.Sequential(nn.Conv2d(1, 1, 3)))
    with pytest.raises(SurgeryError, match=r"'0'.*bake"):
        crop(model)


def test_nan_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3))
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = math.nan
    with pytest.raises(SurgeryError, match="'0'"):
        crop(model)


def test_an_unknown_layer_is_refused_by_name() -> None:
    with pytest.raises(SurgeryError, match="'9'"):
        crop_to(nn.Sequential(nn.Conv2d(1, 1, 3)), {"9": Window(1, 1, 1, 1)})


@pytest.mark.parametrize("value", ["", "lossy", "-1", "nan", "inf", "1", 1.0, -0.1, None, True, "1e400"])
def test_other_tolerances_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="lossless"):
        parse_tolerance(value)


@pytest.mark.parametrize(("value", "expected"), [("lossless", "lossless"), ("1e-3", 1e-3), (0, 0.0), (0.5, 0.5)])
def test_tolerances_are_parsed(value: Any, expected: Any) -> None:
    assert parse_tolerance(value) == expected


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="fp16"):
        crop(nn.Sequential(nn.Conv2d(1, 1, 3)), "lossless", precision="fp12")  # type: ignore[arg-type]


class TestLossless:
    """Taps that are zero, or become zero in the chosen precision, and no others."""

    @staticmethod
    def kernel(outer: float) -> Tensor:
        weight = torch.full((2, 1, 3, 3), outer)
        weight[:, :, 1, 1] = 1.0
        return weight

    @pytest.mark.parametrize(
        ("precision", "outer", "zero"),
        [
            ("fp32", 1e-45, False),
            ("fp32", 0.0, True),
            ("tf32", 1e-45, False),
            ("bf16", 1e-45, True),
            ("bf16", 1e-38, False),
            ("fp16", 2.9e-8, True),
            ("fp16", 3.1e-8, False),
            ("int8", 0.99 / 254, True),
            ("int8", 1.01 / 254, False),
            ("fp8", 1e-7, True),
            ("fp8", 1e-5, False),
        ],
    )
    def test_by_precision(self, precision: Any, outer: float, zero: bool) -> None:
        weight = self.kernel(outer)
        assert bool(zero_taps(weight, precision)[:, :, 0].all()) is zero
        model = nn.Sequential(nn.Conv2d(1, 2, 3))
        model[0].weight = nn.Parameter(weight)
        assert (crop(model, "lossless", precision=precision)[0].kernel_size == (1, 1)) is zero

    @pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm])
    def test_a_batchnorm_that_will_be_folded_counts(self, norm: Callable[[int], nn.Module]) -> None:
        # 2e-8 is zero in fp16, but not once a BatchNorm of variance 1e-4 has multiplied it by 100.
        model = nn.Sequential(nn.Conv2d(1, 2, 3), norm(2)).eval()
        model[0].weight = nn.Parameter(self.kernel(2e-8))
        assert crop(model, "lossless", precision="fp16")[0].kernel_size == (1, 1)
        model[1].running_var.fill_(1e-4)
        assert crop(model, "lossless", precision="fp16")[0].kernel_size == (3, 3)

    def test_one_channel_keeps_the_window_open(self) -> None:
        weight = self.kernel(0.0)
        weight[1, 0, 0, 1] = 1e-30
        model = nn.Sequential(nn.Conv2d(1, 2, 3))
        model[0].weight = nn.Parameter(weight)
        assert crop(model, "lossless")[0].kernel_size == (3, 1)

    def test_fp16_weights_are_the_same_after_the_crop(self) -> None:
        torch.manual_seed(0)
        baked = bake(convert(nn.Sequential(nn.Conv2d(3, 8, 7, padding=3)), sigma=0.45))
        cropped = crop(baked, "lossless", precision="fp16")
        assert cropped[0].kernel_size < baked[0].kernel_size
        x = torch.randn(1, 3, 12, 12).half()
        assert torch.equal(
            F.conv2d(x.double(), cropped.half()[0].weight.double(), padding=cropped[0].padding),
            F.conv2d(x.double(), baked.half()[0].weight.double(), padding=3),
        )


def test_a_network_is_cut_as_another_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 5, padding=2), nn.Conv2d(2, 2, 3)).eval()
    cut, x = crop_to(model, {"0": Window(1, 1, 3, 3)}), torch.randn(1, 1, 8, 8)
    other = copy.deepcopy(model)
    lost = crop_alike(other, [("0", (5, 5), (1, 1), (3, 3))])
    assert torch.equal(other(x), cut(x))
    assert lost == {"0": removed_share(model[0].weight, Window(1, 1, 3, 3))}
    with pytest.raises(SurgeryError, match=r"layer '1' was \(5, 5\) before that crop, here it is \(3, 3\)"):
        crop_alike(model, [("1", (5, 5), (1, 1), (3, 3))])
    with pytest.raises(SurgeryError, match="layer 'head' cannot be cropped"):
        crop_alike(model, [("head", (5, 5), (1, 1), (3, 3))])


def test_the_function_is_not_hidden_by_its_module() -> None:
    """`gmconv.crop` is the function, whichever of the package's modules were imported before."""
    code = "import gmconv.cropping.choose, gmconv; assert gmconv.crop is gmconv.cropping.choose.crop"
    subprocess.run([sys.executable, "-c", code], check=True)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("alexnet", "vgg11_bn", "resnet50", "resnet152")]


@pytest.mark.parametrize("arch", ["resnet20", "resnet18", "mobilenet_v2", *SLOW])
@torch.no_grad()
def test_a_lossless_crop_of_a_zoo_network_changes_only_the_order_of_sums(arch: str) -> None:
    """In float64 the outputs agree to 1e-13; in float32 the crop is as near to float64 as the uncropped network is."""
    torch.manual_seed(1)
    live = models.create(arch, gmconv=True).eval()
    generator = torch.Generator().manual_seed(1)
    for module in live.modules():
        if isinstance(module, GMConv2d):
            module.sigma.copy_(torch.rand(1, generator=generator) * 0.35 + 0.05)
    masked = [module for module in live.modules() if isinstance(module, GMConv2d)]
    masked[len(masked) // 2].sigma.fill_(0.05)  # zero beyond the centre of any kernel, so there is something to crop
    baked = bake(live)
    cropped = crop(baked, "lossless")
    assert [c.weight.shape for c in cropped.modules() if isinstance(c, nn.Conv2d)] != [
        c.weight.shape for c in baked.modules() if isinstance(c, nn.Conv2d)
    ]
    size = 224 if arch == "alexnet" else 32 if arch == "resnet20" else 64
    x = torch.randn(2, 3, size, size, generator=generator)
    before, after = live(x), cropped(x)
    exact, exact_cropped = baked.double()(x.double()), cropped.double()(x.double())
    rms = exact.square().mean().sqrt()
    assert float((exact_cropped - exact).abs().max() / rms) <= 1e-13
    error = [float((found - exact).square().mean().sqrt() / rms) for found in (before, after)]
    assert error[1] <= 1.5 * error[0] + 1e-7
