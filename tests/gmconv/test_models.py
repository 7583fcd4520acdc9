"""The zoo: names, counts and key lists are those of the public networks; masks add one sigma per masked layer."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import gmconv
from gmconv.errors import CheckpointError

# Published parameter counts: torchvision's model pages; for the CIFAR ResNets the widely used option A counts.
COUNTS = {
    "alexnet": 61_100_840,
    "vgg11": 132_863_336,
    "vgg11_bn": 132_868_840,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnet8": 75_290,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet56": 853_018,
    "mobilenet_v2": 3_504_872,
}
# Convolutions larger than 1x1, counted from the papers' tables.
MASKED = {
    "alexnet": 5,
    "vgg11": 8,
    "vgg11_bn": 8,
    "vgg16": 13,
    "vgg16_bn": 13,
    "resnet18": 17,
    "resnet34": 33,
    "resnet50": 17,
    "resnet101": 34,
    "resnet152": 51,
    "resnet8": 7,
    "resnet20": 19,
    "resnet32": 31,
    "resnet56": 55,
    "mobilenet_v2": 18,
}
BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def create(name: str, **kwargs: object) -> nn.Module:
    with torch.device("meta"):  # names and shapes need no memory
        return gmconv.models.create(name, **kwargs)


def parameters(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def bn(prefix: str) -> list[str]:
    return [f"{prefix}.{part}" for part in BN]


def test_list_names_every_network() -> None:
    assert gmconv.models.list() == sorted(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    twin, masked = parameters(create(name, gmconv=False)), parameters(create(name))
    assert sum(torch.Size(shape).numel() for shape in twin.values()) == COUNTS[name]
    extra = {key: shape for key, shape in masked.items() if key not in twin}
    assert {key: masked[key] for key in twin} == twin
    assert len(extra) == MASKED[name]
    assert all(key.endswith(".sigma") and shape == (1,) for key, shape in extra.items())


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2"])
def test_sigma_per_channel_adds_one_sigma_per_output_channel(name: str) -> None:
    masked = parameters(create(name, sigma_per="channel", sigma=2.0))
    for key, shape in masked.items():
        if key.endswith(".sigma"):
            assert shape == masked[key.replace(".sigma", ".weight")][:1]


def test_alexnet_keys_are_torchvisions() -> None:
    layers = [f"features.{i}" for i in (0, 3, 6, 8, 10)] + [f"classifier.{i}" for i in (1, 4, 6)]
    keys = [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]
    assert list(create("alexnet", gmconv=False).state_dict()) == keys


def test_resnet50_keys_are_torchvisions() -> None:
    keys = ["conv1.weight", *bn("bn1")]
    for stage, depth in enumerate((3, 4, 6, 3), start=1):
        for block in range(depth):
            at = f"layer{stage}.{block}"
            for i in (1, 2, 3):
                keys += [f"{at}.conv{i}.weight", *bn(f"{at}.bn{i}")]
            if block == 0:
                keys += [f"{at}.downsample.0.weight", *bn(f"{at}.downsample.1")]
    assert list(create("resnet50", gmconv=False).state_dict()) == [*keys, "fc.weight", "fc.bias"]


def test_resnet18_has_a_downsample_from_the_second_stage_on() -> None:
    keys = create("resnet18", gmconv=False).state_dict()
    stages = [name for name in keys if name.endswith("downsample.0.weight")]
    assert stages == [f"layer{stage}.0.downsample.0.weight" for stage in (2, 3, 4)]


def test_mobilenet_v2_keys_are_torchvisions() -> None:
    keys = ["features.0.0.weight", *bn("features.0.1")]
    keys += ["features.1.conv.0.0.weight", *bn("features.1.conv.0.1")]
    keys += ["features.1.conv.1.weight", *bn("features.1.conv.2")]
    for index in range(2, 18):
        at = f"features.{index}.conv"
        keys += [f"{at}.0.0.weight", *bn(f"{at}.0.1"), f"{at}.1.0.weight", *bn(f"{at}.1.1")]
        keys += [f"{at}.2.weight", *bn(f"{at}.3")]
    keys += ["features.18.0.weight", *bn("features.18.1"), "classifier.1.weight", "classifier.1.bias"]
    assert list(create("mobilenet_v2", gmconv=False).state_dict()) == keys


def test_vgg16_bn_keys_are_torchvisions() -> None:
    convs = [0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40]
    keys: list[str] = []
    for index in convs:
        keys += [f"features.{index}.weight", f"features.{index}.bias", *bn(f"features.{index + 1}")]
    keys += [f"classifier.{i}.{part}" for i in (0, 3, 6) for part in ("weight", "bias")]
    assert list(create("vgg16_bn", gmconv=False).state_dict()) == keys


def test_cifar_resnet_keys_are_the_common_ones() -> None:
    keys = ["conv1.weight", *bn("bn1")]
    for stage in (1, 2, 3):
        for block in range(3):
            at = f"layer{stage}.{block}"
            keys += [f"{at}.conv1.weight", *bn(f"{at}.bn1"), f"{at}.conv2.weight", *bn(f"{at}.bn2")]
    keys += ["linear.weight", "linear.bias"]
    assert list(create("resnet20", gmconv=False).state_dict()) == keys


@pytest.mark.parametrize(("name", "size"), [("alexnet", 64), ("vgg11_bn", 32), ("resnet18", 33), ("resnet50", 32)])
def test_torchvision_networks_give_logits_for_small_images(name: str, size: int) -> None:
    model = gmconv.models.create(name, num_classes=7, in_channels=1).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 1, size, size)).shape == (2, 7)


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
@pytest.mark.parametrize("size", [(8, 8), (17, 22)])
def test_cifar_resnet_takes_any_odd_kernel_and_any_input_size(kernel_size: int, size: tuple[int, int]) -> None:
    model = gmconv.models.resnet20(kernel_size=kernel_size, num_classes=4).eval()
    kernels = {m.kernel_size for m in model.modules() if isinstance(m, nn.Conv2d)}
    assert kernels == {(kernel_size, kernel_size)}
    assert model(torch.zeros(2, 3, *size)).shape == (2, 4)


def test_the_option_a_shortcut_is_every_second_pixel_and_zero_channels() -> None:
    block = gmconv.models.resnet20(gmconv=False).layer2[0]
    x = torch.randn(2, 16, 9, 6)
    shortcut = block._shortcut(x)
    assert torch.equal(shortcut[:, 8:24], x[:, :, ::2, ::2])
    assert shortcut.shape == (2, 32, 5, 3)
    assert not shortcut[:, :8].any()
    assert not shortcut[:, 24:].any()


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "mobilenet_v2"])
def test_forward_is_the_same_graph_for_any_batch_height_and_width(name: str) -> None:
    model = gmconv.models.create(name, gmconv=False, num_classes=5).eval()
    dims = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=33), 3: torch.export.Dim("width", min=33)}
    program = torch.export.export(model, (torch.randn(2, 3, 80, 96),), dynamic_shapes=(dims,)).module()
    x = torch.randn(3, 3, 65, 34)
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x))


def test_the_twin_computes_what_a_flat_mask_does() -> None:
    torch.manual_seed(0)
    masked = gmconv.models.create("resnet20", sigma=float("inf")).eval()
    twin = gmconv.models.create("resnet20", gmconv=False).eval()
    twin.load_state_dict({k: v for k, v in masked.state_dict().items() if not k.endswith("sigma")})
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(masked(x), twin(x))


@pytest.mark.parametrize("name", ["alexnet", "resnet20", "mobilenet_v2"])
def test_arch_kwargs_of_a_checkpoint_rebuild_either_form(name: str) -> None:
    kwargs = {"num_classes": 3, "in_channels": 1, "sigma": 1.5, "sigma_per": "layer"}
    masked, twin = create(name, gmconv=True, **kwargs), create(name, gmconv=False, **kwargs)
    assert any(isinstance(m, gmconv.GMConv2d) for m in masked.modules())
    assert not any(isinstance(m, gmconv.GMConv2d) for m in twin.modules())


def test_factories_are_attributes_with_their_own_keywords() -> None:
    for name in gmconv.models.list():
        factory = getattr(gmconv.models, name)
        assert factory.__name__ == name
        assert factory.__doc__
        assert {"gmconv", "sigma", "sigma_per", "num_classes", "in_channels"} <= set(
            inspect.signature(factory).parameters
        )


def test_sigma_starts_where_it_is_told() -> None:
    layer = gmconv.models.resnet20(sigma=0.75).conv1
    assert layer.sigma.item() == 0.75


@pytest.mark.parametrize(
    ("name", "kwargs", "said"),
    [
        ("resnet51", {}, "did you mean"),
        ("ResNet50", {}, "resnet50"),
        ("", {}, "known: alexnet"),
        ("resnet18", {"kernel_size": 7}, "takes no kernel_size"),
        ("resnet20", {"kernel_size": 4}, "odd"),
        ("resnet20", {"kernel_size": "7"}, "odd"),
        ("resnet20", {"num_classes": 0}, "num_classes"),
        ("resnet20", {"in_channels": True}, "in_channels"),
        ("resnet20", {"sigma_per": "pixel"}, "sigma_per"),
        ("__class__", {}, "no network"),
    ],
)
def test_what_the_zoo_does_not_have_is_refused_in_one_sentence(name: str, kwargs: dict[str, object], said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as refusal:
        gmconv.models.create(name, **kwargs)
    assert refusal.value.exit_code == 3
    assert "\n" not in refusal.value.message
