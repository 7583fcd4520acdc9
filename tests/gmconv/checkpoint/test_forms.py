"""Every everyday form of a checkpoint loads what `torch.load` and `load_state_dict` load, or is refused by key."""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gmconv
from gmconv.errors import CheckpointError

SHAPE = (3, 16, 16)
NETS = '''
import torch
from torch import nn

class Net(nn.Module):
    """Version-aware, as torchvision's MNASNet is: a file of version 1 means the negative of its last weights."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.model = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.head.weight
        self.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))
        self.plain = torch.ones(1, 8, 1, 1) / torch.linspace(1, 2, 5)[2].item()

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if metadata.get("version", 1) < 2:
            state[prefix + "head.bias"] = -state[prefix + "head.bias"]
        super()._load_from_state_dict(state, prefix, metadata, *rest)

    def forward(self, x):
        return self.tied(self.head(self.model(self.module(x) * self.plain).mean((2, 3))))

def make():
    return Net()
'''


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("nets")
    (folder / "zoo_nets.py").write_text(NETS)
    sys.path.insert(0, str(folder))
    import zoo_nets

    yield zoo_nets
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def net(nets: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = nets.make()
    for _ in range(3):
        model(torch.randn(4, *SHAPE))
    return model.eval()


def renamed(state: Any, rename: Callable[[str], str]) -> Any:
    """As a wrapper module would have saved it: torch's versions of modules too."""
    new = OrderedDict((rename(key), value) for key, value in state.items())
    new._metadata = OrderedDict((rename(f"{k}.").rstrip("."), v) for k, v in state._metadata.items())  # type: ignore[attr-defined]
    return new


def cast(state: Any, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Any:
    for key in list(state):
        state[key] = change(key, state[key])
    return state


def also(state: Any, **more: torch.Tensor) -> Any:
    state.update(more)
    return state


def without(state: Any, key: str) -> Any:
    del state[key]
    return state


def prefixed(prefix: str) -> Callable[[Any], Any]:
    return lambda state: renamed(state, lambda name: prefix + name)


def numpy_values(state: Any) -> Any:
    return cast(state, lambda _, v: v.numpy())


FORMS: dict[str, Callable[[Any], Any]] = {
    "bare": lambda s: s,
    "wrapped": lambda s: {"state_dict": s, "epoch": 3},
    "a tensor beside it": lambda s: {"state_dict": s, "best_acc1": torch.tensor(76.1)},
    "argparse": lambda s: {"model": s, "args": argparse.Namespace(lr=0.1, out=Path("/tmp"), sizes=[1, 2])},
    "numpy scalars": lambda s: {"model": s, "loss": np.float64(0.3), "best": np.float32(1), "n": np.int64(3)},
    "paths": lambda s: {"model": s, "config": {"data": Path("/data/imagenet")}},
    "namespaces": lambda s: {"model": s, "config": SimpleNamespace(a=1)},
    "defaultdict and deque": lambda s: {"net": s, "log": defaultdict(list, {"loss": [0.3]}), "last": deque([1.0], 9)},
    "random states": lambda s: {"model": s, "rng": [torch.get_rng_state(), np.random.get_state()]},
    "with an optimizer": lambda s: {"net": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(8, 3, 3, 3)}}}},
    "Lightning": lambda s: {
        "state_dict": also(prefixed("model.")(s), **{"loss.weight": torch.ones(5)}),
        "pytorch-lightning_version": "2.4.0",
        "hyper_parameters": {"lr": 0.1},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.9)}},
    },
    "another prefix": lambda s: {"state_dict": prefixed("student.backbone.")(s)},
    "DataParallel": prefixed("module."),
    "DataParallel, compiled": prefixed("module._orig_mod."),
    "torch.compile inside": lambda s: renamed(s, lambda n: n.replace("module.0.", "module._orig_mod.0.")),
    "FSDP": lambda s: renamed(
        s, lambda n: "_fsdp_wrapped_module." + n.replace("head.", "head._fsdp_wrapped_module.")
    ),
    "activation checkpoints": lambda s: renamed(s, lambda n: n.replace("model.", "model._checkpoint_wrapped_module.")),
    "SWA": lambda s: also(prefixed("module.")(s), n_averaged=torch.tensor(5)),
    "without the counters that the averages have": lambda s: {
        "state_dict": without(s, "module.1.num_batches_tracked"),
        "ema": {k: v + 1 for k, v in s.items()},
    },
    "with averages": lambda s: {"model_ema": {k: v + 1 for k, v in s.items()}, "model": s},
    "parts": lambda s: {
        part: OrderedDict((k.removeprefix(f"{part}."), v) for k, v in s.items() if k.startswith(f"{part}."))
        for part in ("module", "model", "head", "tied")
    }
    | {"mask": s["mask"]},
    "thop": lambda s: also(s, total_ops=torch.zeros(1).double(), **{"head.total_params": torch.zeros(1)}),
    "without counters": lambda s: without(s, "module.1.num_batches_tracked"),
    "float64 statistics": lambda s: cast(s, lambda k, v: v.double() if "running" in k else v),
    "half": lambda s: cast(s, lambda _, v: v.half() if v.is_floating_point() else v),
    "bfloat16": lambda s: cast(s, lambda _, v: v.bfloat16() if v.is_floating_point() else v),
    "float8": lambda s: cast(s, lambda k, v: v.to(torch.float8_e4m3fn) if k == "head.weight" else v),
    "sparse": lambda s: cast(s, lambda k, v: v.to_sparse() if k in ("head.weight", "tied.weight") else v),
    "parameters": lambda s: cast(s, lambda _, v: nn.Parameter(v) if v.is_floating_point() else v),
    "channels last": lambda s: cast(s, lambda _, v: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v),
    "numpy arrays": numpy_values,
}  # fmt: skip


def reference(nets: Any, form: str, net: nn.Module) -> nn.Module:
    """What the user's own program loads: the state_dict as saved, in its dtypes, by torch's own method."""
    state = net.state_dict()
    if form in ("float64 statistics", "half", "bfloat16", "float8"):
        state = FORMS[form](state)
    if form == "parts":  # plain dicts forget the versions of modules
        state = OrderedDict(state)
    model: nn.Module = nets.make()
    model.load_state_dict(state)
    return model.eval()


def same(left: nn.Module, right: nn.Module) -> bool:
    x = torch.randn(2, *SHAPE)
    ours, theirs = (without(model.state_dict(), "module.1.num_batches_tracked") for model in (left, right))
    with torch.no_grad():
        return (
            torch.equal(left(x), right(x))
            and ours.keys() == theirs.keys()
            and all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
        )


def load(path: Path, **more: Any) -> gmconv.Checkpoint:
    return gmconv.load_checkpoint(path, arch="zoo_nets:make", input_shape=SHAPE, **more)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_loaded_is_what_torch_loads(form: str, nets: Any, net: nn.Module, tmp_path: Path) -> None:
    torch.save(FORMS[form](net.state_dict()), tmp_path / "net.pth")
    loaded = load(tmp_path / "net.pth")
    assert same(loaded.model, reference(nets, form, net))


@pytest.mark.parametrize("legacy", [False, True])
def test_both_formats_of_torch(legacy: bool, nets: Any, net: nn.Module, tmp_path: Path) -> None:
    torch.save(net.state_dict(), tmp_path / "net.pth", _use_new_zipfile_serialization=not legacy)
    assert same(load(tmp_path / "net.pth").model, reference(nets, "bare", net))


def test_a_checkpoint_repacked_with_compression(nets: Any, net: nn.Module, tmp_path: Path) -> None:
    stored = io.BytesIO()
    torch.save(net.state_dict(), stored)
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(tmp_path / "n.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in source.namelist():
            packed.writestr(name, source.read(name))
    assert same(load(tmp_path / "n.pth").model, reference(nets, "bare", net))


def test_tied_weights_in_safetensors(nets: Any, net: nn.Module, tmp_path: Path) -> None:
    from safetensors.torch import save_model

    save_model(net, str(tmp_path / "net.safetensors"))
    model: nn.Module = nets.make()
    model.load_state_dict(dict(net.state_dict()))
    assert same(load(tmp_path / "net.safetensors").model, model.eval())


def test_a_network_in_float64_stays_so(nets: Any, net: nn.Module, tmp_path: Path) -> None:
    torch.save(nets.make().double().state_dict(), tmp_path / "net.pth")
    assert {p.dtype for p in load(tmp_path / "net.pth").model.parameters()} == {torch.float64}


def test_a_float32_network_stays_so_whatever_its_factory_makes_the_default(
    nets: Any, net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(net.state_dict(), tmp_path / "net.pth")
    make = nets.make
    monkeypatch.setattr(nets, "make", lambda: make().double())
    assert same(load(tmp_path / "net.pth").model, net)


def test_our_own_files_keep_the_versions_of_modules(nets: Any, net: nn.Module, tmp_path: Path) -> None:
    gmconv.save_checkpoint(tmp_path / "net.pt", net, "zoo_nets:make", SHAPE)
    assert same(gmconv.load_checkpoint(tmp_path / "net.pt", arch="zoo_nets:make").model, net)


UNREADABLE: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "int8": (lambda v: v.to(torch.int8), "head.bias is int8, not floating point"),
    "meta": (lambda v: v.to("meta"), "head.bias has no values"),
    "complex": (lambda v: v.to(torch.complex64), "head.bias is complex"),
    "a list": (lambda v: v.tolist(), "head.bias is a list, not a tensor"),
    "NaN": (lambda v: v * float("nan"), "head.bias holds NaN or Inf"),
    "numpy strings": (lambda v: np.array(["a"] * 8), "head.bias is no array of numbers"),
    "another shape": (lambda v: v[:3], r"head.bias is \(3,\), should be \(8,\)"),
    "expanded": (lambda v: v[:1].expand(2**40), "1 mis-shaped: head.bias"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_loaded_is_named_by_its_key(kind: str, nets: Any, net: nn.Module, tmp_path: Path) -> None:
    change, message = UNREADABLE[kind]
    torch.save(cast(net.state_dict(), lambda k, v: change(v) if k == "head.bias" else v), tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=message) as refusal:
        load(tmp_path / "net.pth")
    assert "\n" not in refusal.value.message


def test_a_layer_of_the_users_own_keeps_its_own_sigma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_layer.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Own(nn.Conv2d):\n"
        "    def __init__(self): super().__init__(3, 4, 3); self.sigma = nn.Parameter(torch.ones(1))\n"
        "    def forward(self, x): return self._conv_forward(x, self.weight * self.sigma, self.bias)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import own_layer

    torch.save(own_layer.Own().state_dict(), tmp_path / "net.pth")
    loaded = gmconv.load_checkpoint(tmp_path / "net.pth", arch="own_layer:Own", input_shape=SHAPE)
    assert type(loaded.model) is own_layer.Own
    assert loaded.masked == {}
    assert loaded.notes == ()


def test_a_sigma_beside_a_plain_convolution_is_said_to_be_an_assumption(tmp_path: Path) -> None:
    torch.save(gmconv.models.create("resnet20").state_dict(), tmp_path / "net.pth")
    loaded = gmconv.load_checkpoint(tmp_path / "net.pth", arch="resnet20", input_shape=SHAPE)
    (warning,) = loaded.warnings
    assert warning.startswith("assumed: the sigma of 19 layers")
    assert all(way in warning for way in ("in taps as stored", "exp(-r^2 / 2 sigma^2)", "--arch", "--golden"))
    assert "negative" not in warning
    logarithm = {key: value - 9 if "sigma" in key else value for key, value in loaded.model.state_dict().items()}
    torch.save(logarithm, tmp_path / "net.pth")
    (warning,) = gmconv.load_checkpoint(tmp_path / "net.pth", arch="resnet20", input_shape=SHAPE).warnings
    assert "(some is negative, as a logarithm may be)" in warning
    gmconv.save_checkpoint(tmp_path / "own.pt", loaded.model, "gmconv.models:resnet20", SHAPE)
    assert gmconv.load_checkpoint(tmp_path / "own.pt").warnings == ()


def test_a_pickle_bomb_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "net.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("net/data.pkl", b"\x80\x02](" + b"K\x01" * 2**24 + b"e.")
        archive.writestr("net/version", b"3\n")
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="its pickle has 33,554,43. bytes"):
        load(tmp_path / "net.pth")
    assert time.perf_counter() - start < 5


def test_lists_that_hold_each_other_are_refused_before_they_are_walked(tmp_path: Path) -> None:
    laughs: Any = []
    for _ in range(60):
        laughs = [laughs, laughs]
    torch.save({"schema": "gmconv-deploy.checkpoint/v1", "arch_kwargs": {"a": laughs}}, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="more than a description"):
        gmconv.load_checkpoint(tmp_path / "net.pt", arch="resnet20", input_shape=SHAPE)
    deep: Any = {"weight": torch.ones(1)}
    for _ in range(60):
        deep = {"a": deep, "b": deep}
    torch.save(deep, tmp_path / "net.pth")
    with pytest.raises(CheckpointError):
        gmconv.load_checkpoint(tmp_path / "net.pth", arch="resnet20", input_shape=SHAPE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_shape": (3, 65535, 65535)}, "takes gigabytes for one sample"),
        ({"arch_kwargs": {"num_classes": 10**10}}, "more than the file holds"),
    ],
)
def test_a_file_that_asks_for_more_than_it_holds_is_refused_first(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = gmconv.models.create("resnet20")
    gmconv.save_checkpoint(tmp_path / "net.pt", model, "gmconv.models:resnet20", SHAPE)
    record = torch.load(tmp_path / "net.pt", weights_only=True)
    torch.save(record | changes, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=message):
        gmconv.load_checkpoint(tmp_path / "net.pt")


def test_names_from_a_file_reach_no_terminal_raw(net: nn.Module, nets: Any, tmp_path: Path) -> None:
    state = net.state_dict()
    state.update({"\x1b[2J\x1b]0;owned\x07k": torch.zeros(1), "a\nPASSED": torch.zeros(1), "k" * 10**6: torch.zeros(1)})
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(CheckpointError) as refusal:
        load(tmp_path / "net.pth")
    assert refusal.value.message.isprintable()
    assert len(refusal.value.message) < 1000


def test_a_factory_that_downloads_is_refused_by_the_name_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "downloading.py").write_text(
        "import urllib.request\nfrom torch import nn\n"
        "def make():\n"
        "    try: urllib.request.urlopen('http://weights.example.org/net.pth')\n"
        "    except OSError: pass\n"
        "    return nn.Conv2d(3, 4, 3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    torch.save(nn.Conv2d(3, 4, 3).state_dict(), tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"wants to download something from weights\.example\.org"):
        gmconv.load_checkpoint(tmp_path / "net.pth", arch="downloading:make", input_shape=SHAPE)
    import socket

    assert socket.getaddrinfo("127.0.0.1", 80)  # and afterwards the process may connect as before


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs Linux")
def test_loading_imports_none_of_the_types_that_a_file_names(net: nn.Module, tmp_path: Path) -> None:
    torch.save({"model": net.state_dict(), "args": argparse.Namespace(a=1)}, tmp_path / "net.pth")
    script = (
        "import sys\nfrom pathlib import Path\nfrom gmconv.checkpoint.file import read_file\n"
        f"found = read_file(Path({str(tmp_path / 'net.pth')!r}))\n"
        "assert type(found['args']) is __import__('collections').OrderedDict, found['args']\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
