"""Networks whose one input is no image: told by `--input` alone, from the state dict to the proof and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gmconv
from export import export_onnx
from gmconv.errors import CheckpointError, RefusedError
from runtime import compare_artefacts, score_artefacts


class Wave(nn.Module):
    """A convolution over that many axes."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        kind: type[nn.Module] = {1: nn.Conv1d, 3: nn.Conv3d}[axes]
        self.conv = kind(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(2).mean(2)


class Tokens(nn.Module):
    """Whole numbers below 9."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens).mean(1)


def wave() -> nn.Module:
    return Wave(1)


def volume() -> nn.Module:
    return Wave(3)


@pytest.mark.parametrize(("factory", "told"), [(wave, ("x", (1, 40), "float32")), (Tokens, ("tokens", (12,), "int64"))])
def test_one_input_of_any_rank_is_enough(
    factory: Callable[[], nn.Module], told: tuple[str, tuple[int, ...], str], tmp_path: Path
) -> None:
    """From a state dict to a proven file, to parity with it, and to a checkpoint of ours that says it itself."""
    arch = f"{__name__}:{factory.__name__}"
    net, file = tmp_path / "net.pth", tmp_path / "net.onnx"
    torch.save(factory().state_dict(), net)
    text = f"{told[0]}:{','.join(map(str, told[1]))}:{told[2]}"
    manifest = export_onnx(net, file, arch=arch, input=text)
    assert [(spec.name, spec.dtype, spec.shape) for spec in manifest.inputs] == [
        (told[0], told[2], ("batch", *told[1]))
    ]
    assert compare_artefacts(net, file, arch=arch, input=text).passed
    loaded = gmconv.load_checkpoint(net, arch=arch, inputs=[told])
    assert loaded.input_shape is None
    gmconv.save_checkpoint(tmp_path / "own.pt", loaded.model, arch, None, inputs=[told])
    assert gmconv.load_checkpoint(tmp_path / "own.pt", arch=arch).inputs == loaded.inputs


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({}, "give --input-shape C,H,W of one image, or --input NAME:SHAPE"),
        ({"input_shape": (1, 216)}, "is not C,H,W in pixels; an input that is no image is told as --input NAME"),
        (
            {"inputs": [("x", (1, 6, 6, 6), "float32")], "input_shape": (1, 6, 36)},
            "--input-shape 1,6,36 is none of its",
        ),
        (
            {"inputs": [("x", (1, 6, 6, 6), "float32")], "preprocessing": {"mean": (0.0,), "std": (1.0,)}},
            "preprocessing is of images, and none of the network's inputs is one",
        ),
    ],
)
def test_what_does_not_tell_the_input_of_a_volume_is_refused(said: dict[str, Any], words: str, tmp_path: Path) -> None:
    torch.save(volume().state_dict(), tmp_path / "net.pth")
    with pytest.raises((RefusedError, CheckpointError), match=words):
        gmconv.load_checkpoint(tmp_path / "net.pth", arch=f"{__name__}:volume", **said)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"dynamic_hw": True}, "dynamic_hw=True frees height and width of images"),
        ({"crop": "1e-3"}, "cropping knows networks of one image"),
    ],
)
def test_free_sides_and_a_crop_are_those_of_an_image(asked: dict[str, Any], words: str, tmp_path: Path) -> None:
    torch.save(volume().state_dict(), tmp_path / "net.pth")
    with pytest.raises(RefusedError, match=words):
        export_onnx(tmp_path / "net.pth", tmp_path / "net.onnx", arch=f"{__name__}:volume", input="x:1,6,6,6", **asked)


def test_it_is_judged_on_labelled_arrays(tmp_path: Path) -> None:
    """Top-1 of both forms on whole numbers by their name, and of one array by any."""
    net, file = tmp_path / "net.pth", tmp_path / "net.onnx"
    model = Tokens()
    torch.save(model.state_dict(), net)
    export_onnx(net, file, arch=f"{__name__}:Tokens", input="tokens:5:int64")
    tokens = torch.arange(9)[:, None].expand(9, 5)
    labels = model(tokens).argmax(1)
    for name in ("tokens", "words"):
        np.savez(tmp_path / "data.npz", **{name: tokens.numpy().copy(), "labels": labels.numpy()})
        found = score_artefacts([net, file], arch=f"{__name__}:Tokens", data=tmp_path / "data.npz")
        assert [row.score.top1.value for row in found.rows] == [1.0, 1.0]
    for data, words in (
        (tmp_path, "holds images alone, no 'tokens'"),
        ("digits", "give --data FILE.npz|data=FILE.npz"),
    ):
        with pytest.raises(RefusedError, match=words):
            score_artefacts(file, data=data)


class Idle(Wave):
    """Its second input goes nowhere."""

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


def test_an_input_that_no_output_depends_on_is_told(tmp_path: Path) -> None:
    torch.save(Idle().state_dict(), tmp_path / "net.pth")
    manifest = export_onnx(
        tmp_path / "net.pth", tmp_path / "net.onnx", arch=f"{__name__}:Idle", input=["x:1,40", "y:5"]
    )
    assert manifest.export is not None
    assert manifest.export.notes[-1] == "no output depends on these inputs: y"
