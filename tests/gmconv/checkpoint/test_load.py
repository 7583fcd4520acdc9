"""Checkpoints round-trip, foreign ones load, and everything else is refused in one sentence that runs no code."""

from __future__ import annotations

import contextlib
import importlib
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gmconv
from gmconv.errors import ArchitectureUnavailableError, CheckpointError, RefusedError
from gmconv.surgery import masked_layers

SHAPE = (3, 16, 16)
ARCH = "gmconv.models:resnet20"


def trained(sigma_per: str = "layer") -> nn.Module:
    torch.manual_seed(0)
    model = gmconv.models.create("resnet20", sigma_per=sigma_per)
    for layer in masked_layers(model).values():
        nn.init.uniform_(layer.sigma, 0.4, 5)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return trained()


@pytest.fixture(scope="module")
def saved(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "net.pt"
    gmconv.save_checkpoint(path, model, arch=ARCH, input_shape=SHAPE, labels=tuple("0123456789"))
    return path


def test_labels_in_a_file_are_not_the_letters_of_its_name(model: nn.Module, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    file = str(tmp_path / "labels.txt")
    gmconv.save_checkpoint(tmp_path / "net.pt", model, ARCH, SHAPE, labels=file)
    assert gmconv.load_checkpoint(tmp_path / "net.pt").labels == ("cat", "dog")
    assert gmconv.load_checkpoint(saved, labels=file).labels == ("cat", "dog")


def test_a_network_whose_train_returns_nothing_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "from torch import nn\nclass Net(nn.Linear):\n    def train(self, mode=True): super().train(mode)\n"
    (tmp_path / "own_nets_that_train.py").write_text(f"{source}def make(): return Net(2, 2)\n")
    monkeypatch.syspath_prepend(tmp_path)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "net.pth")
    arch, inputs = "own_nets_that_train:make", [("x", (2,), "float32")]
    found = gmconv.load_checkpoint(tmp_path / "net.pth", arch=arch, inputs=inputs)
    assert not found.model.training


@pytest.mark.parametrize("made", [lambda: nn.LazyLinear(3), lambda: nn.Linear(2, 3, device="meta")])
def test_a_network_without_values_is_not_saved(made: Callable[[], nn.Module], tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="'weight' is (lazy|on the meta device) and has no values"):
        gmconv.save_checkpoint(tmp_path / "net.pt", made(), ARCH, SHAPE)
    assert list(tmp_path.iterdir()) == []


def same_outputs(left: nn.Module, right: nn.Module) -> bool:
    x = torch.randn(2, *SHAPE)
    with torch.no_grad():
        return torch.equal(left(x), right(x))


@pytest.mark.parametrize("sigma_per", ["layer", "channel"])
def test_round_trip(sigma_per: str, tmp_path: Path) -> None:
    model = trained(sigma_per)
    path = tmp_path / "net.pt"
    gmconv.save_checkpoint(
        path, model, ARCH, SHAPE, {"num_classes": 10}, dataset={"name": "digits"}, training={"accuracy": 0.98}
    )
    loaded = gmconv.load_checkpoint(path)
    assert same_outputs(loaded.model, model)
    assert not loaded.model.training
    assert (loaded.arch, loaded.input_shape, loaded.arch_kwargs) == (ARCH, SHAPE, {"num_classes": 10})
    assert set(loaded.masked.values()) == {sigma_per}
    assert loaded.dataset == {"name": "digits"}
    assert loaded.training == {"accuracy": 0.98}


def test_a_plain_twin_round_trips_without_masks(tmp_path: Path) -> None:
    twin = gmconv.models.create("resnet20", gmconv=False).eval()
    gmconv.save_checkpoint(tmp_path / "twin.pt", twin, ARCH, SHAPE)
    loaded = gmconv.load_checkpoint(tmp_path / "twin.pt")
    assert loaded.masked == {}
    assert same_outputs(loaded.model, twin)


def test_save_refuses_an_architecture_that_does_not_rebuild_the_model(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not rebuild this model"):
        gmconv.save_checkpoint(tmp_path / "net.pt", model, "gmconv.models:resnet32", SHAPE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict", "state_dict_ema", "ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_foreign_state_dicts(wrapper: str | None, prefix: str, model: nn.Module, tmp_path: Path) -> None:
    state: dict[str, Any] = {prefix + key: value for key, value in model.state_dict().items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "foreign.pt")
    loaded = gmconv.load_checkpoint(tmp_path / "foreign.pt", arch="resnet20", num_classes=10, input_shape=SHAPE)
    assert same_outputs(loaded.model, model)
    assert len(loaded.masked) == len(masked_layers(model))


def test_two_sets_of_weights_are_said_to_be_two(model: nn.Module, tmp_path: Path) -> None:
    averaged = {key: value * 2 if key.endswith("sigma") else value for key, value in model.state_dict().items()}
    torch.save({"state_dict_ema": averaged, "state_dict": model.state_dict()}, tmp_path / "two.pt")
    loaded = gmconv.load_checkpoint(tmp_path / "two.pt", arch="resnet20", input_shape=SHAPE)
    assert loaded.warnings[0] == (
        "weights taken from 'state_dict'; the file also holds 'state_dict_ema', which computes something else: "
        "--weights KEY says which are meant"
    )
    assert same_outputs(loaded.model, model)


def test_one_network_that_a_wrapper_holds_twice_is_no_choice(model: nn.Module, tmp_path: Path) -> None:
    twice = {f"{place}.{key}": value for place in ("model", "loss.model") for key, value in model.state_dict().items()}
    torch.save({"state_dict": twice}, tmp_path / "two.pt")
    loaded = gmconv.load_checkpoint(tmp_path / "two.pt", arch="resnet20", input_shape=SHAPE)
    assert loaded.notes == (
        "weights taken from 'state_dict.model'; the file holds the same at 'state_dict.loss.model'",
    )
    assert not [text for text in loaded.warnings if "weights" in text]
    assert same_outputs(loaded.model, model)


@pytest.mark.parametrize(
    ("place", "raw", "said"),
    [
        ("state_dict_ema", "state_dict", {"state_dict_ema": "state_dict_ema", "state_dict": "state_dict"}),
        ("ema.module", "model", {"ema.module": "ema.module", "ema": "ema.module", "model": "model"}),
        ("ema.model", "model", {"ema": "ema.model", "model": "model"}),
        ("callbacks.Average.state.module", "state_dict.net", {"callbacks": "callbacks.Average.state.module"}),
        ("state_dict.ema_model.module", "state_dict.model", {"ema_model": "state_dict.ema_model.module"}),
        ("state_dict.net.ema", "state_dict.net", {"ema": "state_dict.net.ema", "state_dict.net": "state_dict.net"}),
        ("net_ema.module._orig_mod", "net.module._orig_mod", {"net_ema": "net_ema.module._orig_mod"}),
    ],
)
def test_the_weights_are_the_callers_choice(place: str, raw: str, said: dict[str, str], tmp_path: Path) -> None:
    networks = {place: trained("layer"), raw: trained("channel")}
    tree: dict[str, Any] = {"epoch": 3}
    for path, network in networks.items():
        inner = tree
        for key in path.split("."):
            inner = inner.setdefault(key, {})
        inner.update(network.state_dict())
    torch.save(tree, tmp_path / "two.pt")
    for key, found in said.items():
        loaded = gmconv.load_checkpoint(tmp_path / "two.pt", arch="resnet20", input_shape=SHAPE, weights=key)
        assert loaded.notes[0] == f"weights taken from {found!r}"
        assert same_outputs(loaded.model, networks[found])


def test_a_part_that_several_have_is_refused_with_those(model: nn.Module, tmp_path: Path) -> None:
    torch.save({"state_dict": {"net": model.state_dict(), "ema": trained("layer").state_dict()}}, tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match="may mean 'state_dict.net', 'state_dict.ema'; name one of them in full"):
        gmconv.load_checkpoint(tmp_path / "two.pt", arch="resnet20", input_shape=SHAPE, weights="state_dict")


@pytest.mark.parametrize("key", ["ema", "", "optimizer", "state_dict_e", "\x1b[2J"])
def test_weights_that_are_not_there_are_refused_with_those_that_are(key: str, model: nn.Module, tmp_path: Path) -> None:
    state = model.state_dict()
    torch.save(
        {"state_dict": state, "state_dict_ema": {**state}, "optimizer": {"m": torch.ones(1)}}, tmp_path / "two.pt"
    )
    with pytest.raises(CheckpointError, match="^[^\x1b]* --weights .*; they are at 'state_dict', 'state_dict_ema'$"):
        gmconv.load_checkpoint(tmp_path / "two.pt", arch="resnet20", input_shape=SHAPE, weights=key)


def test_half_precision_is_widened_exactly(model: nn.Module, tmp_path: Path) -> None:
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    torch.save(half, tmp_path / "half.pt")
    loaded = gmconv.load_checkpoint(tmp_path / "half.pt", arch="resnet20", input_shape=SHAPE)
    assert all(p.dtype == torch.float32 for p in loaded.model.parameters())
    assert torch.equal(loaded.model.state_dict()["conv1.weight"], half["conv1.weight"].float())


def test_safetensors(model: nn.Module, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "net.safetensors")
    loaded = gmconv.load_checkpoint(tmp_path / "net.safetensors", arch="resnet20", input_shape=SHAPE)
    assert same_outputs(loaded.model, model)


def test_legacy_format_without_a_zip(model: nn.Module, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    loaded = gmconv.load_checkpoint(tmp_path / "old.pt", arch="resnet20", input_shape=SHAPE)
    assert same_outputs(loaded.model, model)


def test_a_factory_that_the_caller_names_may_be_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "callers_nets.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Conv2d(3, 4, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = gmconv.convert(nn.Sequential(nn.Conv2d(3, 4, 3)))
    torch.save(model.state_dict(), tmp_path / "net.pt")
    loaded = gmconv.load_checkpoint(tmp_path / "net.pt", arch="callers_nets:make", input_shape=SHAPE)
    assert same_outputs(loaded.model, model)


def test_a_file_may_not_choose_code_to_run(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('code ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    record = {
        "schema": "gmconv-deploy.checkpoint/v1",
        "arch": "evil:make",
        "input_shape": SHAPE,
        "masked": {},
        "state_dict": model.state_dict(),
    }
    torch.save(record, tmp_path / "net.pt")
    with pytest.raises(
        CheckpointError, match="a file may not choose code to run: if you trust it, say --arch evil:make"
    ):
        gmconv.load_checkpoint(tmp_path / "net.pt")


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/gmconv-code-ran"),))


def bad_file(kind: str, good: bytes, path: Path) -> None:
    if kind == "directory":
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "random bytes":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif kind == "text":
        path.write_text("epoch,loss\n1,0.3\n")
    elif kind == "text that reads as a pickle":
        path.write_text("circle\nsquare.bar\n")
    elif kind == "another zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "hello")
    elif kind == "TorchScript":
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)
    elif kind == "torch.export":
        torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), path.with_suffix(".pt2"))
        path.with_suffix(".pt2").rename(path)
    elif kind == "pickle with code":
        path.write_bytes(pickle.dumps({"state_dict": _Bomb()}, protocol=2))
    elif kind == "zip with code":
        torch.save({"state_dict": _Bomb()}, path)
    elif kind == "whole module":
        torch.save(nn.Linear(2, 2), path)
    elif kind == "a tensor":
        torch.save(torch.ones(3), path)
    elif kind == "no tensors":
        torch.save({"epoch": 3, "loss": 0.1}, path)
    elif kind == "half a file":
        path.write_bytes(good[: len(good) // 2])


BAD_FILES = {
    "missing": "no such file",
    "directory": "is a directory",
    "empty": "is empty",
    "random bytes": "not a readable PyTorch checkpoint",
    "text": "not a readable PyTorch checkpoint",
    "text that reads as a pickle": "not a readable PyTorch checkpoint",
    "another zip": "not a readable PyTorch checkpoint",
    "TorchScript": r"is a TorchScript archive; save model.state_dict\(\)",
    "torch.export": r"is a torch.export archive; save model.state_dict\(\)",
    "pickle with code": "nothing in a checkpoint may run code",
    "zip with code": "nothing in a checkpoint may run code",
    "whole module": "holds a pickled torch.nn.modules.linear.Linear",
    "a tensor": "holds a Tensor, not a state_dict",
    "no tensors": r"holds no state_dict \(its keys: epoch, loss\)",
    "half a file": "not a readable PyTorch checkpoint",
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_refused_in_one_sentence(kind: str, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    bad_file(kind, saved.read_bytes(), path)
    with pytest.raises(CheckpointError, match=BAD_FILES[kind]) as refusal:
        gmconv.load_checkpoint(path, arch="resnet20", input_shape=SHAPE)
    assert "\n" not in refusal.value.message
    assert str(path) in refusal.value.message
    assert not Path("/tmp/gmconv-code-ran").exists()


@settings(deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncation_at_any_byte_is_refused(share: float, saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("cut") / "net.pt"
    good = saved.read_bytes()
    path.write_bytes(good[: int(len(good) * share)])
    with pytest.raises(CheckpointError):
        gmconv.load_checkpoint(path)


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_never_a_traceback(
    data: st.DataObject, saved: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("flip") / "net.pt"
    damaged = bytearray(saved.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, min(len(damaged), 20_000) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    with contextlib.suppress(CheckpointError):
        gmconv.load_checkpoint(path)


def edited(saved: Path, path: Path, **changes: Any) -> Path:
    record = torch.load(saved, weights_only=True)
    record.update(changes)
    torch.save(record, path)
    return path


def with_state(saved: Path, path: Path, **changes: Any) -> Path:
    state = dict(torch.load(saved, weights_only=True)["state_dict"])
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del state[name]
        else:
            state[name] = value
    return edited(saved, path, state_dict=state)


def test_keys_that_do_not_fit_are_listed(saved: Path, tmp_path: Path) -> None:
    path = with_state(saved, tmp_path / "net.pt", conv1__weight=None, extra=torch.ones(1), linear__bias=torch.ones(3))
    expected = "1 missing: conv1.weight; 1 unexpected: extra; 1 mis-shaped: linear.bias is (3,), should be (10,)"
    with pytest.raises(CheckpointError) as refusal:
        gmconv.load_checkpoint(path)
    assert expected in refusal.value.message


def test_only_the_first_ten_are_listed(model: nn.Module, tmp_path: Path) -> None:
    state = {f"x{i}": torch.ones(1) for i in range(25)} | model.state_dict()
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=r"25 unexpected: x0, .*x9 and 15 more"):
        gmconv.load_checkpoint(tmp_path / "net.pt", arch="resnet20", input_shape=SHAPE)


@pytest.mark.parametrize("key", ["conv1__weight", "conv1__sigma", "bn1__running_var"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused_by_key(key: str, value: float, saved: Path, model: nn.Module, tmp_path: Path) -> None:
    bad = model.state_dict()[key.replace("__", ".")].clone()
    bad.view(-1)[0] = value
    with pytest.raises(CheckpointError, match=key.replace("__", ".") + " holds NaN or Inf"):
        gmconv.load_checkpoint(with_state(saved, tmp_path / "net.pt", **{key: bad}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "gmconv-deploy.checkpoint/v9"}, "schema 'gmconv-deploy.checkpoint/v9' is unknown here"),
        ({"arch": "gmconv.models:resnet21"}, "resnet21"),
        ({"arch": "timm:hf-hub:evil/repo"}, "outside gmconv.models"),
        ({"arch": "gmconv.models:__import__"}, "__import__"),
        ({"arch": 3}, "does not say its architecture"),
        ({"arch_kwargs": {"weights": "x"}}, "may not set 'weights'"),
        ({"arch_kwargs": {"width": torch.ones(1)}}, "is a Tensor"),
        ({"arch_kwargs": {"nonsense": 1}}, "net.pt: resnet20 takes no nonsense"),
        ({"input_shape": (3, 0, 16)}, "is not C,H,W"),
        ({"input_shape": "3,16,16"}, "is not C,H,W"),
        ({"masked": {"conv1": "tap"}}, "list of masked layers is damaged"),
        ({"masked": {"nowhere": "layer"}}, "no convolution named 'nowhere'"),
        ({"labels": [1, 2]}, "labels are not a list of strings"),
        ({"preprocessing": 7}, "its preprocessing is an int"),
    ],
)
def test_bad_metadata_is_refused(changes: dict[str, Any], message: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        gmconv.load_checkpoint(edited(saved, tmp_path / "net.pt", **changes))


@pytest.mark.parametrize("arch", ["timm:resnet18", "torchvision.models:resnet18"])
def test_a_package_that_is_not_installed_is_named(arch: str, model: nn.Module, tmp_path: Path) -> None:
    package = arch.split(":")[0].split(".")[0]
    with contextlib.suppress(ImportError, RuntimeError):  # a torchvision that does not match torch raises RuntimeError
        importlib.import_module(package)
        pytest.skip(f"{package} is installed here")
    torch.save(model.state_dict(), tmp_path / "net.pt")
    with pytest.raises(ArchitectureUnavailableError, match=f"pip install {package}") as refusal:
        gmconv.load_checkpoint(tmp_path / "net.pt", arch=arch, input_shape=SHAPE)
    assert refusal.value.exit_code == 6


def test_a_foreign_file_must_be_told_its_architecture_and_input(model: nn.Module, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="give --arch NAME"):
        gmconv.load_checkpoint(tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="give --input-shape C,H,W"):
        gmconv.load_checkpoint(tmp_path / "net.pt", arch="resnet20")


def test_saving_where_one_may_not_write_is_one_sentence(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written"):
        gmconv.save_checkpoint(tmp_path / "nowhere" / "net.pt", model, ARCH, SHAPE)


def test_a_network_in_wrappers_is_saved_and_built_without_them(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gmconv.save_checkpoint(tmp_path / "net.pt", nn.DataParallel(model), ARCH, SHAPE)
    assert same_outputs(gmconv.load_checkpoint(tmp_path / "net.pt").model, model)
    (tmp_path / "wrapping_nets.py").write_text(
        "from gmconv.models import resnet20\nimport torch\ndef make(): return torch.nn.DataParallel(resnet20())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    loaded = gmconv.load_checkpoint(tmp_path / "net.pt", arch="wrapping_nets:make")
    assert not isinstance(loaded.model, nn.DataParallel)
    assert same_outputs(loaded.model, model)
