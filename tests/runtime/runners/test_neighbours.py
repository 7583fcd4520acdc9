"""A checkpoint that does not say what its network takes is told by the other files of the same command."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gmconv
from export import export_onnx
from gmconv.errors import ArchitectureUnsaidError, CheckpointError, InputsUnsaidError
from gmconv.foreign import NOTHING, Foreign
from runtime import compare_artefacts, score_artefacts, time_artefacts
from runtime.artefact import Facts, usual_inputs
from runtime.manifest import TensorSpec
from runtime.runners.neighbours import with_neighbours
from runtime.runners.torch import load

ARCH = f"{__name__}:Net"
pytestmark = pytest.mark.xdist_group("test_neighbours")  # its network is exported once


class Net(nn.Module):
    """An image and whole numbers below 7."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table = nn.Conv2d(1, 4, 3), nn.Embedding(7, 4)

    def forward(self, image: Tensor, age: Tensor) -> Tensor:
        return self.conv(image).mean((2, 3)) + self.table(age).mean(1)


TOLD = (("image", (1, 6, 6), "float32"), ("age", (2,), "int64"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`net.pth`, weights alone; `net.onnx` of it, with a manifest; `bare.onnx`, without."""
    folder = tmp_path_factory.mktemp("neighbours")
    torch.manual_seed(0)
    torch.save(Net().state_dict(), folder / "net.pth")
    export_onnx(folder / "net.pth", folder / "net.onnx", arch=ARCH, input=["image:1,6,6", "age:2:int64"])
    shutil.copy(folder / "net.onnx", folder / "bare.onnx")
    return folder


@pytest.mark.parametrize("name", ["net.onnx", "bare.onnx"])
def test_an_exported_file_says_what_its_network_takes(name: str, folder: Path) -> None:
    found = with_neighbours(Foreign(arch=ARCH), [folder / "net.pth", folder / name])
    assert found.usual_inputs == TOLD
    loaded = load(folder / "net.pth", found)
    assert tuple((one.name, one.shape, one.dtype) for one in loaded.inputs) == TOLD


def test_half_precision_and_free_sides_are_the_files_and_not_the_networks() -> None:
    spec = TensorSpec("x", "float16", ("batch", 3, "height", "width"))
    assert usual_inputs([spec], Facts(shapes={"x": (3, 8, 6)})) == (("x", (3, 8, 6), "float32"),)
    assert usual_inputs([spec], Facts()) is None


def test_what_the_caller_or_the_file_says_comes_first(folder: Path, tmp_path: Path) -> None:
    other = (("image", (1, 9, 9), "float32"), TOLD[1])
    said = Foreign(arch=ARCH, inputs=other)
    assert with_neighbours(said, [folder / "net.pth", folder / "net.onnx"]) == said
    gmconv.save_checkpoint(tmp_path / "own.pt", Net(), ARCH, None, inputs=other)
    own = load(tmp_path / "own.pt", with_neighbours(Foreign(arch=ARCH), [tmp_path / "own.pt", folder / "net.onnx"]))
    assert own.input_shape == (1, 9, 9)


def test_each_command_takes_it_from_the_files_it_is_given(folder: Path, tmp_path: Path) -> None:
    import numpy as np

    net, exported = folder / "net.pth", folder / "net.onnx"
    assert compare_artefacts(net, exported, arch=ARCH, samples=4).passed
    assert len(time_artefacts([net, exported], arch=ARCH, duration=0, warm_up=0, iterations=2).rows) == 2
    arrays = {"image": np.zeros((4, 1, 6, 6), "float32"), "age": np.ones((4, 2), "int64"), "labels": np.zeros(4, int)}
    np.savez(tmp_path / "data.npz", **arrays)
    assert len(score_artefacts([net, exported], arch=ARCH, data=tmp_path / "data.npz").rows) == 2


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        ({}, ArchitectureUnsaidError, f"--arch {ARCH} --input image:1,6,6 --input age:2:int64$"),
        ({"arch": ARCH}, InputsUnsaidError, "does not say what it takes; .* --input age:2:int64$"),
    ],
)
def test_alone_it_is_refused_with_all_that_it_needs(
    said: dict[str, Any], kind: type[Exception], words: str, folder: Path
) -> None:
    with pytest.raises(kind, match=words):
        load(folder / "net.pth", Foreign(**said))
    with pytest.raises(ArchitectureUnsaidError, match="give --arch NAME and --input-shape C,H,W of one image"):
        load(folder / "net.pth", NOTHING)


def test_the_architecture_is_that_of_the_file_at_hand_before_those_beside_the_checkpoint(
    folder: Path, tmp_path: Path
) -> None:
    for name in ("net.pth", "net.onnx", "net.onnx.json"):
        shutil.copy(folder / name, tmp_path / name)
    for name in ("net.onnx", "net.onnx.json"):  # a sibling, the first by name
        shutil.copy(folder / name, tmp_path / name.replace("net", "a"))
    given = with_neighbours(Foreign(), [tmp_path / "net.pth", tmp_path / "net.onnx"])
    with pytest.raises(CheckpointError, match=rf"; net\.onnx was exported from it with --arch {ARCH}"):
        load(tmp_path / "net.pth", given)
